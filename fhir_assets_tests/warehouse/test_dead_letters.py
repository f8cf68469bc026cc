"""Repositories of dead letters: a repeated failure is one row, and selections, pages and counts are complete."""

from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.ops import dead_letter_resolution, dead_letters, liveness, replays
from fhir_assets.warehouse.ops.dead_letter_resolution import DeadLetterResolution
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Selection, StoredDeadLetter
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, connect

DEAD_LETTER = DeadLetter(
    resource_type="Patient",
    resource_id="a",
    stage="validate",
    rule="cardinality",
    path="Patient.name",
    message="is missing",
    resource=b'{"resourceType": "Patient", "id": "a"}',
    partition_key="2024-01-01",
    issues=[{"rule": "cardinality", "severity": "error", "path": "Patient.name", "message": "is missing"}],
)


def stored(conn: Connection, selection: Selection | None = None) -> list[StoredDeadLetter]:
    return dead_letters.find(conn, selection or Selection())


def begin(conn: Session, run_id: str) -> DeadLetterResolution:
    """Return the resolution of a run that begins to validate the partition of DEAD_LETTER."""
    recorded_before = dead_letter_resolution.next_record_number(lambda: nullcontext(conn))
    return DeadLetterResolution(run_id, "Patient", "validate", ["2024-01-01"], recorded_before)


def test_a_failure_repeated_in_a_later_run_adds_an_attempt_to_its_dead_letter(conn: Session) -> None:
    dead_letters.record(conn, "one", [DEAD_LETTER])
    dead_letters.record(conn, "two", [replace(DEAD_LETTER, rule="structure")])
    [dead_letter] = stored(conn)
    assert (dead_letter.attempts, dead_letter.occurrences, dead_letter.status) == (2, 1, "open")
    assert (dead_letter.first_run_id, dead_letter.run_id, dead_letter.rule) == ("one", "two", "structure")


def test_equal_resources_of_a_run_are_one_dead_letter_with_their_number_of_occurrences(conn: Session) -> None:
    dead_letters.record(conn, "one", [DEAD_LETTER] * 3)
    dead_letters.record(conn, "one", [DEAD_LETTER] * 2)
    assert [(dead_letter.occurrences, dead_letter.attempts) for dead_letter in stored(conn)] == [(5, 1)]
    dead_letters.record(conn, "two", [DEAD_LETTER] * 2)
    assert [(dead_letter.occurrences, dead_letter.attempts) for dead_letter in stored(conn)] == [(2, 2)]


@pytest.mark.parametrize("change", [{"stage": "load"}, {"partition_key": "w"}, {"resource": b"{}"}, {"resource": None}])
def test_another_stage_partition_or_content_makes_another_dead_letter(conn: Connection, change: dict[str, str]) -> None:
    dead_letters.record(conn, "one", [DEAD_LETTER, replace(DEAD_LETTER, **change)])  # type: ignore[arg-type]
    assert len(stored(conn)) == 2


def test_dead_letters_without_a_resource_differ_by_their_reason(conn: Session) -> None:
    bare = replace(DEAD_LETTER, resource=None, stage="export")
    dead_letters.record(conn, "one", [bare, bare, replace(bare, message="another")])
    assert sorted(dead_letter.occurrences for dead_letter in stored(conn)) == [1, 2]


def test_a_resource_that_is_neither_json_nor_text_is_returned_as_received(conn: Session) -> None:
    body = bytes(range(256)) * 3
    dead_letters.record(conn, "one", [replace(DEAD_LETTER, resource=body, resource_id="x\0\ud800" * 200)])
    [dead_letter] = stored(conn)
    assert dead_letters.read_resource(conn, dead_letter.id) == body
    with pytest.raises(KeyError):
        dead_letters.read_resource(conn, dead_letter.id + 1)


def test_dead_letters_that_did_not_fail_again_are_resolved_in_their_partitions_only(conn: Session) -> None:
    failed = [replace(DEAD_LETTER, resource=bytes([n])) for n in range(3)]
    elsewhere = [replace(DEAD_LETTER, stage="load"), replace(DEAD_LETTER, partition_key="w")]
    elsewhere.append(replace(DEAD_LETTER, resource_type="Encounter"))
    dead_letters.record(conn, "one", failed + elsewhere)
    resolution = begin(conn, "two")
    dead_letters.record(conn, "two", failed[:1])
    assert dead_letter_resolution.resolve_dead_letters(conn, resolution) == 2
    assert len(stored(conn, Selection(status="open"))) == 4
    assert {dead_letter.resolved_run_id for dead_letter in stored(conn, Selection(status="resolved"))} == {"two"}
    dead_letters.record(conn, "three", failed)
    assert len(stored(conn, Selection(status="open"))) == 6
    assert all(dead_letter.resolved_at is None for dead_letter in stored(conn))


def test_a_dead_letter_that_another_run_recorded_since_the_begin_is_not_resolved(conn: Session) -> None:
    failed = [replace(DEAD_LETTER, resource=bytes([n])) for n in range(3)]
    dead_letters.record(conn, "one", failed)
    resolution = begin(conn, "load")
    dead_letters.record(conn, "load", failed[:1])
    dead_letters.record(conn, "replay", failed[:2])
    assert dead_letter_resolution.resolve_dead_letters(conn, resolution) == 1
    assert sorted(letter.status for letter in stored(conn)) == ["open", "open", "resolved"]
    assert dead_letter_resolution.count_dead(conn, "Patient", ["2024-01-01"]) == {"2024-01-01": 2}


def test_a_dead_letter_that_fails_again_keeps_the_claim_of_a_live_run_only(database: str, conn: Session) -> None:
    letters = [replace(DEAD_LETTER, resource=bytes([n])) for n in range(2)]
    dead_letters.record(conn, "one", letters)
    first, second = sorted(letter.id for letter in stored(conn))
    replays.request_replay(conn, Selection(ids=[first]), claimed_by="live")
    replays.request_replay(conn, Selection(ids=[second]), claimed_by="killed")
    with connect(database, autocommit=True) as other:
        liveness.hold_liveness_lock(other, "live")
        dead_letters.record(conn, "load", letters)
        claims = conn.execute("SELECT status, claimed_by, run_id FROM ops.dead_letters ORDER BY id").fetchall()
        assert claims == [("replaying", "live", "load"), ("open", None, "load")]
        assert replays.request_replay(conn, Selection(), claimed_by="second") == 1


def test_a_discarded_dead_letter_stays_discarded_if_it_fails_again(conn: Session) -> None:
    dead_letters.record(conn, "one", [DEAD_LETTER])
    conn.execute("UPDATE ops.dead_letters SET status = 'discarded'")
    dead_letters.record(conn, "two", [DEAD_LETTER])
    dead_letter_resolution.resolve_dead_letters(conn, begin(conn, "three"))
    assert [(dead_letter.status, dead_letter.attempts) for dead_letter in stored(conn)] == [("discarded", 2)]


def test_selections_filter_by_every_field_and_pages_are_complete(conn: Session) -> None:
    dead_letters.record(conn, "one", (replace(DEAD_LETTER, resource=str(n).encode()) for n in range(12_000)))
    dead_letters.record(conn, "two", [replace(DEAD_LETTER, stage="load", rule="unloadable", resource_type="Claim")])
    now = datetime.now(UTC)
    day = timedelta(days=1)
    for selection in (
        Selection(run_id="two"),
        Selection(stage="load"),
        Selection(rule="unloadable", since=now - day, until=now + day),
        Selection(resource_type="Claim", status="open", partition_keys=["2024-01-01"]),
    ):
        assert [dead_letter.resource_type for dead_letter in stored(conn, selection)] == ["Claim"]
    assert stored(conn, Selection(until=now - day)) == []
    seen: list[int] = []
    before = None
    while page := dead_letters.find(conn, Selection(run_id="one"), before=before, limit=5000):
        seen += [dead_letter.id for dead_letter in page]
        before = seen[-1]
    assert len(seen) == 12_000
    assert seen == sorted(set(seen), reverse=True)


def test_counts_by_reason_begin_with_the_most_occurrences(conn: Session) -> None:
    dead_letters.record(conn, "one", [DEAD_LETTER, replace(DEAD_LETTER, resource=b"1"), DEAD_LETTER])
    dead_letters.record(conn, "one", [replace(DEAD_LETTER, resource=b"2", rule="json", path="f:1")])
    assert dead_letters.count_by_reason(conn, Selection(resource_type="Patient")) == [
        {"stage": "validate", "rule": "cardinality", "path": "Patient.name", "dead_letters": 2, "occurrences": 3},
        {"stage": "validate", "rule": "json", "path": "f:1", "dead_letters": 1, "occurrences": 1},
    ]


def test_record_now_survives_the_rollback_of_the_caller(database: str, conn: Session) -> None:
    dead_letters.record(conn, "one", [replace(DEAD_LETTER, resource=b"lost")])
    dead_letters.record_now(lambda: connect(database, cipher=NO_ENCRYPTION), "one", [DEAD_LETTER])
    conn.rollback()
    assert [dead_letter.resource_id for dead_letter in stored(conn)] == ["a"]
