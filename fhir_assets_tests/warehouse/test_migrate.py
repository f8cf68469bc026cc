"""Migrations on a real Postgres."""

import shutil
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from psycopg import sql

from fhir_assets.catalog import CATALOG
from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db import migrations
from fhir_assets.warehouse.postgres.db.connections import connect


def test_an_empty_database_becomes_current(empty_database: str) -> None:
    assert migrations.current(empty_database) is None
    assert not migrations.is_current(empty_database)
    migrations.upgrade(empty_database)
    assert migrations.is_current(empty_database)
    with connect(empty_database) as conn:
        rows = conn.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'fhir.resource'::regclass"
        ).fetchall()
    assert {row[0] for row in rows} == {f"fhir.resource_{t.key}" for t in CATALOG} | {"fhir.resource_other"}


def test_migrating_again_changes_nothing(database: str) -> None:
    before = migrations.current(database)
    migrations.upgrade(database)
    assert migrations.current(database) == before


def test_several_processes_may_migrate_at_once(empty_database: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrations.upgrade, [empty_database] * 4))
    assert migrations.is_current(empty_database)


def test_a_type_that_is_new_in_the_catalog_gets_its_partition(database: str) -> None:
    with connect(database) as conn:
        conn.execute("DROP TABLE fhir.resource_patient")
    assert not migrations.is_current(database)
    migrations.upgrade(database)
    assert migrations.is_current(database)


def test_a_newer_schema_is_refused(database: str) -> None:
    with connect(database) as conn:
        conn.execute("UPDATE ops.alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match="upgrade fhir-assets"):
        migrations.upgrade(database)


def test_a_user_without_rights_is_told_what_to_grant(empty_database: str) -> None:
    name = f"powerless_{uuid.uuid4().hex}"
    with connect(empty_database, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        try:
            with pytest.raises(ConfigurationError, match="grant CREATE"):
                migrations.upgrade(empty_database.replace("postgres@", f"{name}@"))
        finally:
            conn.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_migrations_are_found_inside_an_installed_package(empty_database: str, tmp_path: Path) -> None:
    package = Path(migrations.__file__).parents[3]
    shutil.copytree(package, tmp_path / "fhir_assets", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(migrations.sql_folder(), tmp_path / "fhir_assets" / "sql", dirs_exist_ok=True)
    program = (
        "import sys; from fhir_assets.warehouse.postgres.db import migrations; "
        "migrations.upgrade(sys.argv[1]); print(migrations.sql_folder())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, empty_database], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "fhir_assets" / "sql")
    assert migrations.is_current(empty_database)
