"""Resources, state and partitions of two sources in one database and store do not meet."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fhir_assets.fhir.record import Deletion
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.store import Store, open_store
from fhir_assets.warehouse.ops import audit_log, checkpoints, dead_letter_resolution, dead_letters, received
from fhir_assets.warehouse.ops.dead_letter_resolution import DeadLetterResolution
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.ops.received import ReceivedWindow
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import Session, borrow_session, connect
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets_tests.support.views import column, load, patient, select, view

VIEW = view("patient", "Patient", column("gender", "gender", "code"))
WHEN = datetime(2024, 1, 5, tzinfo=UTC)
GENDERS = "SELECT _source, _resource_key, gender FROM fhir.patient ORDER BY 1, 2"


@pytest.fixture
def other(database: str) -> Iterator[Session]:
    with connect(database, cipher=NO_ENCRYPTION, source="other") as session:
        yield session


def test_equal_ids_of_two_sources_are_two_resources(conn: Session, other: Session) -> None:
    for _ in range(2):  # copied the first time, merged the second time
        load(conn, patient("a", gender="male"), views=(VIEW,))
        load(other, patient("a", gender="female"), views=(VIEW,))
    assert select(conn, GENDERS) == [("default", "a", "male"), ("other", "a", "female")]
    ours, theirs = resources.read(conn, "Patient", "a"), resources.read(other, "Patient", "a")
    assert ours is not None
    assert theirs is not None
    assert (b"male" in ours.body, b"female" in theirs.body) == (True, True)
    assert [stored.body for stored in resources.stream_type(conn, "Patient")] == [ours.body]
    load(other, patient("a", "2025-01-01T00:00:00Z", "2", gender="other"), views=(VIEW,))
    assert select(other, GENDERS) == [("default", "a", "male"), ("other", "a", "other")]


def test_a_deletion_at_one_source_leaves_the_resource_of_the_other(conn: Session, other: Session) -> None:
    load(conn, patient("a"), views=(VIEW,))
    load(other, patient("a"), views=(VIEW,))
    counts = deletions.apply(other, [Deletion("Patient", "a", datetime(2026, 1, 1, tzinfo=UTC))], run_id="run")
    other.commit()
    assert counts.deleted["Patient"] == 1
    assert select(conn, "SELECT _source, _resource_key FROM fhir.patient") == [("default", "a")]
    assert resources.read(conn, "Patient", "a") is not None
    assert resources.read(other, "Patient", "a") is None


def test_the_state_of_loads_belongs_to_one_source(conn: Session, other: Session) -> None:
    checkpoints.begin(conn, ["Patient"], WHEN, source_state=None)
    received.record(conn, "api:1", [ReceivedWindow("Patient", "2024-01-05", ("part",), 1, 0)])
    letter = DeadLetter(
        resource_type="Patient",
        resource_id="a",
        stage="validate",
        rule="cardinality",
        path="Patient.name",
        message="is missing",
        resource=b"{}",
        partition_key="2024-01-05",
        ruleset="rules",
    )
    dead_letters.record(conn, "one", [letter])
    conn.commit()
    assert checkpoints.get(other, ["Patient"]) == {}
    assert received.list_by_origin(other, "api:1") == []
    assert received.find_pending(other) == []
    checkpoints.begin(other, ["Patient"], WHEN, source_state="files")
    received.record(other, "api:1", [ReceivedWindow("Patient", "2024-01-05", ("part",), 1, 0)])
    dead_letters.record(other, "two", [letter])
    other.commit()
    assert checkpoints.get(conn, ["Patient"])["Patient"].source_state is None
    rows = select(conn, "SELECT source, run_id FROM ops.dead_letters ORDER BY 1")
    assert rows == [("default", "one"), ("other", "two")]
    resolution = DeadLetterResolution("three", "Patient", "validate", ["2024-01-05"], recorded_before=1000)
    assert dead_letter_resolution.resolve_dead_letters(other, resolution) == 1
    rows = select(other, "SELECT source, status FROM ops.dead_letters ORDER BY 1")
    assert rows == [("default", "open"), ("other", "resolved")]


def test_the_audit_log_tells_equal_ids_of_two_sources_apart(conn: Session, other: Session) -> None:
    assert audit_log.hash_subject(conn, "Patient", "a") != audit_log.hash_subject(other, "Patient", "a")


def test_a_borrowed_session_has_the_source_that_was_asked_for(database: str) -> None:
    for source in ("default", "other", "default"):
        with borrow_session(database, cipher=NO_ENCRYPTION, source=source) as session:
            assert session.source == source
            assert session.execute("SELECT ops.current_source()").fetchone() == (source,)


@pytest.mark.parametrize("bad", ["", "Upper", "two words", "a/b", "x' -c role=admin", "9"])
def test_a_source_that_is_no_key_is_refused(database: str, tmp_path: Path, bad: str) -> None:
    with pytest.raises(ValueError, match="is not the key of a source"):
        connect(database, source=bad)
    with pytest.raises(ValueError, match="is not the key of a source"):
        open_store(str(tmp_path), NO_ENCRYPTION, source=bad)


def commit(store: Store) -> None:
    store.commit([Manifest("raw", "Patient", "2024-01-05", "run", WHEN, ())])


def test_the_default_source_keeps_its_paths_and_others_have_a_folder(tmp_path: Path) -> None:
    default, other = (open_store(str(tmp_path), NO_ENCRYPTION, source=source) for source in ("default", "other"))
    commit(default)
    commit(other)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("manifest.json"))
    assert files == ["raw/patient/2024-01-05/manifest.json", "sources/other/raw/patient/2024-01-05/manifest.json"]
    manifests = [store.manifest("raw", "Patient", "2024-01-05") for store in (default, other)]
    assert [manifest and manifest.source for manifest in manifests] == ["default", "other"]
    assert default.partition_keys("raw", "Patient") == ["2024-01-05"]


def test_a_manifest_of_an_earlier_version_belongs_to_the_default_source(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), NO_ENCRYPTION)
    commit(store)
    file = tmp_path / "raw/patient/2024-01-05/manifest.json"
    text = file.read_text()
    assert '"source": "default"' in text
    file.write_text(text.replace(',\n "source": "default"', ""))
    manifest = store.manifest("raw", "Patient", "2024-01-05")
    assert manifest is not None
    assert manifest.source == "default"
