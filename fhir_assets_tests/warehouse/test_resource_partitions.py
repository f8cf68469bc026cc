"""The partitions of fhir.resource move to a schema of their own, with their rows and rights, beside readers."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.privacy.keys import new_key
from fhir_assets.retries import RetryPolicy
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db import migrations, schema_state
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.earlier_revisions import restore_revision_0042
from fhir_assets_tests.support.key_rotation import open_session
from fhir_assets_tests.support.views import load, patient, select


@pytest.mark.parametrize("keys", [0, 1])
def test_partitions_move_to_their_schema_with_their_rows_and_rights(database: str, keys: int) -> None:
    with open_session(database, *(new_key() for _ in range(keys))) as session:
        load(session, patient("a", gender="female"))
        session.commit()
        restore_revision_0042(database)
        files = select(session, "SELECT pg_relation_filepath('fhir.resource_patient')")
        session.commit()
        migrations.upgrade(database)
        assert select(session, "SELECT pg_relation_filepath('fhir_partitions.resource_patient')") == files
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'fhir' ORDER BY 1"
        assert select(session, tables) == [("patient",), ("patient_name",), ("resource",)]
        stored = resources.read(session, "Patient", "a")
        assert stored is not None
        assert b'"female"' in stored.body
        session.execute("SET ROLE fhir_loader")
        session.commit()
        load(session, patient("a", "2024-01-02T00:00:00Z", "2", gender="male"), patient("b"))
        assert select(session, "SELECT id FROM fhir.resource ORDER BY 1") == [("a",), ("b",)]
        assert select(session, "SELECT gender FROM fhir.patient ORDER BY 1") == [("male",), (None,)]


def test_partitions_that_a_long_query_reads_move_later_and_others_read_meanwhile(database: str) -> None:
    restore_revision_0042(database)
    with (
        connect(database) as long_query,
        connect(database, autocommit=True) as reader,
        connect(database, autocommit=True) as observer,
        ThreadPoolExecutor(1) as pool,
    ):
        long_query.execute("SELECT FROM fhir.resource")
        upgrade = pool.submit(migrations.upgrade, database)
        waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
        try:
            wait_until(lambda: observer.execute(waits, [reader.info.dbname]).fetchone() == (True,), seconds=30)
            reader.execute("SET statement_timeout = '30s'")
            assert reader.execute("SELECT count(*) FROM fhir.resource").fetchone() == (0,)
            assert not upgrade.done()
        finally:
            long_query.rollback()
        upgrade.result()
    assert schema_state.is_current(database)


def test_an_upgrade_that_others_keep_waiting_says_so_and_changes_nothing(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore_revision_0042(database)
    shutil.copytree(schema_state.sql_folder(), tmp_path / "sql")
    revision = tmp_path / "sql" / "migrations" / "versions" / "0043_resource_partitions.py"
    impatient = revision.read_text().replace("attempts_left integer = 100", "attempts_left integer = 1")
    assert impatient != revision.read_text()
    revision.write_text(impatient)
    monkeypatch.setattr(migrations, "sql_folder", lambda: tmp_path / "sql")
    monkeypatch.setattr(migrations, "_PATIENCE", RetryPolicy(budget=-1))
    with connect(database) as long_query:
        long_query.execute("SELECT FROM fhir.resource")
        with pytest.raises(DatabaseUnavailable, match="Other sessions have used the tables"):
            migrations.upgrade(database)
    assert schema_state.read_revision(database) == "0042"
    migrations.upgrade(database)
    assert schema_state.is_current(database)
