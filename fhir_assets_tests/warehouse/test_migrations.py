"""Migrations of empty, current, older and newer databases."""

import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from psycopg import sql
from typer.testing import CliRunner

from fhir_assets.catalog import CATALOG
from fhir_assets.cli.main import app
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, DatabaseUnavailable
from fhir_assets.retries import RetryPolicy
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import migration_checksums, migrations, schema_state
from fhir_assets.warehouse.postgres.db.connections import connect


def test_an_empty_database_becomes_current(empty_database: str) -> None:
    assert schema_state.read_revision(empty_database) is None
    assert not schema_state.is_current(empty_database)
    migrations.upgrade(empty_database)
    assert schema_state.is_current(empty_database)
    with connect(empty_database) as conn:
        rows = conn.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'fhir.resource'::regclass"
        ).fetchall()
        listed = conn.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'fhir'::regnamespace AND relkind = 'r'"
        )
        assert listed.fetchall() == [], "tools list no partition beside the tables"
    names = {"other", *(resource_type.key for resource_type in CATALOG)}
    assert {name for (name,) in rows} == {f"fhir_partitions.resource_{name}" for name in names}


def test_migrating_again_changes_nothing(database: str) -> None:
    before = schema_state.read_revision(database)
    migrations.upgrade(database)
    assert schema_state.read_revision(database) == before


def test_several_processes_may_migrate_at_once(empty_database: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrations.upgrade, [empty_database] * 4))
    assert schema_state.is_current(empty_database)


def test_the_checksums_of_all_migrations_are_recorded_by_the_first_upgrade(database: str) -> None:
    with connect(database) as conn:
        conn.execute("DROP TABLE ops.migration_checksums")
        conn.execute("UPDATE ops.alembic_version SET version_num = '0044'")
    migrations.upgrade(database)
    with connect(database) as conn:
        recorded: dict[str, str] = dict(
            conn.execute("SELECT revision, checksum FROM ops.migration_checksums").fetchall()
        )
    assert recorded == migration_checksums.compute_checksums()
    assert recorded.keys() == schema_state.read_scripts().known


@pytest.mark.parametrize("revision", ["0044", "0046"])
def test_an_applied_migration_whose_file_was_changed_is_told(database: str, tmp_path: Path, revision: str) -> None:
    with connect(database) as conn:
        conn.execute("UPDATE ops.migration_checksums SET checksum = 'other' WHERE revision IN ('0005', '0007')")
        conn.execute("UPDATE ops.alembic_version SET version_num = %s", [revision])
    with pytest.raises(ConfigurationError, match=r"versions for 0005, 0007 are not those .* restore them"):
        Warehouse(load_settings(db_url=database, fhir_assets_home=tmp_path)).migrate()
    assert schema_state.read_revision(database) == revision


def test_an_upgrade_lets_others_pass_while_it_waits_for_a_lock(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "_LOCK_SECONDS", 0.05)
    with connect(database) as conn:
        conn.execute("UPDATE ops.alembic_version SET version_num = '0044'")
    with connect(database) as reader:
        reader.execute("SELECT FROM ops.corrections")
        waits = []

        def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                reader.rollback()

        monkeypatch.setattr(time, "sleep", wait)
        migrations.upgrade(database)
        assert len(waits) == 2
    assert schema_state.is_current(database)


def test_an_upgrade_that_gets_no_lock_for_minutes_changes_nothing_and_says_why(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "_LOCK_SECONDS", 0.05)
    monkeypatch.setattr(migrations, "_PATIENCE", RetryPolicy(budget=-1))
    with connect(database) as conn:
        conn.execute("UPDATE ops.alembic_version SET version_num = '0044'")
    with connect(database) as reader:
        reader.execute("SELECT FROM ops.corrections")
        with pytest.raises(DatabaseUnavailable, match="pg_stat_activity"):
            migrations.upgrade(database)
    assert schema_state.read_revision(database) == "0044"


def test_a_type_that_is_new_in_the_catalog_gets_its_partition(database: str) -> None:
    with connect(database) as conn:
        conn.execute("DROP TABLE fhir_partitions.resource_patient")
    assert not schema_state.is_current(database)
    migrations.upgrade(database)
    assert schema_state.is_current(database)


def test_a_newer_schema_is_refused(database: str) -> None:
    with connect(database) as conn:
        conn.execute("UPDATE ops.alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match="upgrade fhir-assets"):
        migrations.upgrade(database)


def test_the_error_for_a_user_without_rights_names_the_missing_grant(empty_database: str) -> None:
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
    shutil.copytree(schema_state.sql_folder(), tmp_path / "fhir_assets" / "sql", dirs_exist_ok=True)
    program = (
        "import sys; from fhir_assets.warehouse.postgres.db import migrations, schema_state; "
        "migrations.upgrade(sys.argv[1]); print(schema_state.sql_folder())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, empty_database], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "fhir_assets" / "sql")
    assert schema_state.is_current(empty_database)


@pytest.fixture
def old_database(database: str) -> str:
    with connect(database) as conn:
        conn.execute("UPDATE ops.alembic_version SET version_num = '0001'")
    return database


@pytest.mark.parametrize("open_connection", [Warehouse.connect, Warehouse.connect_read_only])
def test_an_old_schema_at_db_url_is_reported_and_not_changed(
    old_database: str, tmp_path: Path, open_connection: Callable[[Warehouse], object]
) -> None:
    warehouse = Warehouse(load_settings(db_url=old_database, fhir_assets_home=tmp_path))
    message = r"at revision 0001, this version needs \d{4}: run `fhir-assets migrate`"
    with pytest.raises(ConfigurationError, match=message):
        open_connection(warehouse)
    assert schema_state.read_revision(old_database) == "0001"


@pytest.mark.parametrize("open_connection", [Warehouse.connect, Warehouse.connect_read_only])
def test_a_missing_schema_at_db_url_is_reported_and_not_created(
    empty_database: str, tmp_path: Path, open_connection: Callable[[Warehouse], object]
) -> None:
    warehouse = Warehouse(load_settings(db_url=empty_database, fhir_assets_home=tmp_path))
    with pytest.raises(ConfigurationError, match="no schema yet: run `fhir-assets migrate`"):
        open_connection(warehouse)
    assert schema_state.read_revision(empty_database) is None


def test_a_missing_partition_is_reported_by_its_type(database: str) -> None:
    with connect(database) as conn:
        conn.execute("DROP TABLE fhir_partitions.resource_patient")
    with pytest.raises(ConfigurationError, match=r"no partition of fhir\.resource for Patient: run"):
        schema_state.require_current(database)


def test_the_command_migrates_an_empty_database(
    empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_URL", empty_database)
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", empty_database)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    assert CliRunner().invoke(app, ["migrate"], catch_exceptions=False).exit_code == 0
    assert schema_state.is_current(empty_database)
    with Warehouse(load_settings()).connect() as session:
        assert session.execute("SELECT count(*) FROM fhir.patient").fetchone() == (0,)
