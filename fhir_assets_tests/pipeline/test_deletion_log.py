"""The log of deletions: recorded in the store before they are applied, compacted, and applied once to each database."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.record import Deletion
from fhir_assets.pipeline.deletions import deletion_log
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import parse_keys
from fhir_assets.storage.reencrypt import list_part_keys
from fhir_assets.storage.store import Store, open_store
from fhir_assets.warehouse.postgres.db.connections import Session, connect

AT = datetime(2024, 1, 5, 10, 30, 0, 123000, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), Cipher(parse_keys([Fernet.generate_key().decode()])))


def open_log(store: Store, url: str) -> DeletionLog:
    return DeletionLog(store, lambda: connect(url, cipher=NO_ENCRYPTION))


def read_deleted(url: str) -> dict[tuple[str, str], datetime]:
    with connect(url) as conn:
        rows = conn.execute("SELECT resource_type, id, deleted_at FROM fhir.resource").fetchall()
    return {(resource_type, identity): at for resource_type, identity, at in rows}


def test_recorded_deletions_are_applied_to_another_database_once_with_time_and_version(
    store: Store, database: str, conn: Session
) -> None:
    recorded = [Deletion("Patient", "p1", AT, "3"), Deletion("Observation", "o1", AT + timedelta(days=1))]
    counts = open_log(store, database).record(iter(recorded), run_id="r")
    assert dict(counts.unknown) == {"Patient": 1, "Observation": 1}
    expected = {("Patient", "p1"): AT, ("Observation", "o1"): AT + timedelta(days=1)}
    assert read_deleted(database) == expected
    conn.execute("TRUNCATE fhir.resource, ops.deletion_parts")
    conn.commit()
    other_log = open_log(store, database)
    for name in ("Patient", "Observation", "Encounter"):
        other_log.apply_pending(conn, name, run_id="r2")
    assert read_deleted(database) == expected
    assert conn.execute("SELECT version_id FROM fhir.resource WHERE id = 'p1'").fetchone() == ("3",)
    assert not other_log.apply_pending(conn, "Patient", run_id="r3").unknown, "a part is applied once"


def test_recorded_deletions_are_encrypted_in_the_store(store: Store, database: str) -> None:
    open_log(store, database).record([Deletion("Patient", "p1", AT)], run_id="r")
    assert [key is not None for _, key in list_part_keys(store)] == [True]


def test_nothing_is_recorded_if_reading_the_deletions_fails(store: Store, database: str) -> None:
    def broken() -> Iterator[Deletion]:
        yield Deletion("Patient", "p1", AT)
        raise NotFhir("broken")

    with pytest.raises(NotFhir):
        open_log(store, database).record(broken(), run_id="r")
    assert read_deleted(database) == {}
    assert store.manifest("deleted", "Patient", "all") is None


def test_an_unknown_resource_type_does_not_create_a_folder(store: Store, database: str, tmp_path: Path) -> None:
    open_log(store, database).record([Deletion("../../Evil", "p1", AT)], run_id="r")
    assert read_deleted(database) == {}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_many_small_parts_are_compacted_without_losing_a_deletion(
    store: Store, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion_log, "MAX_SMALL_PARTS", 4)
    small_log = open_log(store, database)
    for n in range(10):
        small_log.record([Deletion("Patient", f"p{n}", AT)], run_id="r")
    manifest = store.manifest("deleted", "Patient", "all")
    assert manifest is not None
    assert len(manifest.parts) < 4
    assert manifest.rows == 10
    assert set(read_deleted(database)) == {("Patient", f"p{n}") for n in range(10)}
