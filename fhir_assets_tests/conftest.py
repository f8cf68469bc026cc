"""Fixtures of every room: a real Postgres for the session, and an own, migrated database for a test."""

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest
from hypothesis import settings
from psycopg import sql

from fhir_assets.logs import JsonFormatter
from fhir_assets.orchestration.instance.config import dagster_yaml
from fhir_assets.warehouse.postgres.db import embedded, migrations
from fhir_assets.warehouse.postgres.db.connections import Connection, connect, normalise_url, with_database

# What lands is decided on the same examples each time; everywhere else they are new ones at every run.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

_HOME = "FHIR_ASSETS_TEST_HOME"
_TEMPLATE = "fhir_assets_template"


def pytest_configure(config: pytest.Config) -> None:
    """One home for all xdist workers: they inherit the controller's environment."""
    if not hasattr(config, "workerinput"):
        home = tempfile.mkdtemp(prefix="fhir_assets_test_")
        Path(home).chmod(0o711)
        os.environ[_HOME] = home


def pytest_runtest_teardown() -> None:
    """What a test had configured logs to the streams that pytest gave it, which are closed after it."""
    ours = logging.getLogger("fhir_assets")
    for logger in (logging.getLogger(), ours):
        logger.handlers[:] = [each for each in logger.handlers if not isinstance(each.formatter, JsonFormatter)]
    ours.propagate = True


def pytest_unconfigure(config: pytest.Config) -> None:
    """The controller outlives its workers, and stops what they shared."""
    if not hasattr(config, "workerinput") and (home := os.environ.pop(_HOME, None)):
        if (Path(home) / "postgres").exists():
            embedded.stop(Path(home))
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> str:
    """The URL of the session's embedded Postgres; its template database is migrated, and has Dagster's tables."""
    home = Path(os.environ[_HOME])
    url = embedded.ensure(home)
    with connect(url, autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock(1)")
        there = conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", [_TEMPLATE]).fetchone()
        if there is None:
            # Tests kill processes, never the machine.
            conn.execute("ALTER SYSTEM SET fsync = off")
            conn.execute("SELECT pg_reload_conf()")
            conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(f"{_TEMPLATE}_new")))
            migrations.upgrade(with_database(url, f"{_TEMPLATE}_new"))
            dagster_instance(home / "dagster", with_database(url, f"{_TEMPLATE}_new")).dispose()
            conn.execute(
                sql.SQL("ALTER DATABASE {} RENAME TO {}").format(
                    sql.Identifier(f"{_TEMPLATE}_new"), sql.Identifier(_TEMPLATE)
                )
            )
    return url


def dagster_instance(home: Path, url: str) -> dg.DagsterInstance:
    """An instance as the project's ``dagster.yaml`` has it, with its storage in the database at ``url``."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(dagster_yaml(), home / "dagster.yaml")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DAGSTER_POSTGRES_URL", normalise_url(url, "psycopg2"))
        return dg.DagsterInstance.from_config(str(home))


@pytest.fixture
def empty_database(postgres: str) -> Iterator[str]:
    """The URL of a fresh database without any schema of ours."""
    yield from _fresh(postgres, "template0")


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """The URL of a fresh, migrated database."""
    yield from _fresh(postgres, _TEMPLATE)


@pytest.fixture
def conn(database: str) -> Iterator[Connection]:
    """A connection to the test's own database."""
    with connect(database) as connection:
        yield connection


def _fresh(url: str, template: str) -> Iterator[str]:
    with fresh_database(url, template) as made:
        yield made


@contextmanager
def fresh_database(url: str, template: str = _TEMPLATE) -> Iterator[str]:
    """The URL of a database made from a template of the server at ``url``, migrated unless told otherwise."""
    name = f"test_{uuid.uuid4().hex}"
    with connect(url, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
    try:
        yield with_database(url, name)
    finally:
        with connect(url, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a real S3 HTTP server, moto's."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket's ``s3://…``, with the environment that boto3 reads set for it."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/some/prefix"
