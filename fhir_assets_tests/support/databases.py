"""Databases of tests: fresh databases from a migrated template, and Dagster instances that store in them."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import dagster as dg
import pytest
from psycopg import sql

from fhir_assets.orchestration.instance.config import find_dagster_yaml
from fhir_assets.warehouse.postgres.db import migrations
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url, with_database

TEMPLATE = "fhir_assets_template"
"""The name of the migrated database that the databases of tests are copied from."""


@contextmanager
def fresh_database(url: str, template: str = TEMPLATE, *, encoding: str = "UTF8") -> Iterator[str]:
    """Create a database on the server at ``url``, yield its URL and drop it. It is a copy of ``template``: migrated
    by default, without any schema of the project with ``template0``, which alone permits another ``encoding``.
    """
    name = f"test_{uuid.uuid4().hex}"
    with connect(url, autocommit=True) as conn:
        # Copying files takes a third of the time of copying pages through the log.
        conn.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY {}").format(
                sql.Identifier(name),
                sql.Identifier(template),
                sql.SQL("" if encoding == "UTF8" else "ENCODING {} LOCALE 'C'").format(sql.Literal(encoding)),
            )
        )
    try:
        yield with_database(url, name)
    finally:
        with connect(url, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def database_unavailable(postgres: str, database: str) -> Iterator[None]:
    """Refuse new connections to the database and end the existing ones."""
    name = urlsplit(database).path.lstrip("/")
    admit = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    with connect(postgres, autocommit=True) as conn:
        conn.execute(admit.format(sql.Identifier(name), sql.SQL("false")))
        conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            yield
        finally:
            conn.execute(admit.format(sql.Identifier(name), sql.SQL("true")))


def ensure_template(url: str, dagster_home: Path) -> None:
    """Create the template database on the server at ``url`` unless it exists: migrated, with the tables of Dagster."""
    with connect(url, autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock(1)")
        if conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", [TEMPLATE]).fetchone():
            return
        # Tests kill processes, never the machine, so that the disk need not be waited for.
        conn.execute("ALTER SYSTEM SET fsync = off")
        conn.execute("SELECT pg_reload_conf()")
        unfinished = f"{TEMPLATE}_new"
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(unfinished)))
        migrations.upgrade(with_database(url, unfinished))
        dagster_instance(dagster_home, with_database(url, unfinished)).dispose()
        conn.execute(
            sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(unfinished), sql.Identifier(TEMPLATE))
        )


def dagster_instance(home: Path, url: str) -> dg.DagsterInstance:
    """Return an instance with the project's ``dagster.yaml`` and its storage in the database at ``url``."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find_dagster_yaml(), home / "dagster.yaml")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DAGSTER_POSTGRES_URL", normalise_url(url, "psycopg2"))
        return dg.DagsterInstance.from_config(str(home))
