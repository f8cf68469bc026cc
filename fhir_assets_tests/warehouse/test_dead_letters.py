"""Dead letters: one row a failure, however often it comes back."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.ops import dead_letters
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Selection, StoredDeadLetter
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, connect

LETTER = DeadLetter(
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


def test_the_same_failure_in_a_later_run_is_one_letter_with_one_more_attempt(conn: Session) -> None:
    dead_letters.record(conn, "one", [LETTER])
    dead_letters.record(conn, "two", [replace(LETTER, rule="structure")])
    [found] = stored(conn)
    assert (found.attempts, found.occurrences, found.status) == (2, 1, "open")
    assert (found.first_run_id, found.run_id, found.rule) == ("one", "two", "structure")


def test_equal_lines_of_a_run_are_one_letter_that_counts_them(conn: Session) -> None:
    dead_letters.record(conn, "one", [LETTER] * 3)
    dead_letters.record(conn, "one", [LETTER] * 2)
    assert [(each.occurrences, each.attempts) for each in stored(conn)] == [(5, 1)]
    dead_letters.record(conn, "two", [LETTER] * 2)
    assert [(each.occurrences, each.attempts) for each in stored(conn)] == [(2, 2)]


@pytest.mark.parametrize("change", [{"stage": "load"}, {"partition_key": "w"}, {"resource": b"{}"}, {"resource": None}])
def test_another_stage_partition_or_content_is_another_letter(conn: Connection, change: dict[str, str]) -> None:
    dead_letters.record(conn, "one", [LETTER, replace(LETTER, **change)])  # type: ignore[arg-type]
    assert len(stored(conn)) == 2


def test_letters_without_a_resource_are_told_apart_by_their_reason(conn: Session) -> None:
    bare = replace(LETTER, resource=None, stage="export")
    dead_letters.record(conn, "one", [bare, bare, replace(bare, message="another")])
    assert sorted(each.occurrences for each in stored(conn)) == [1, 2]


def test_bytes_that_are_neither_json_nor_text_come_back_as_received(conn: Session) -> None:
    body = bytes(range(256)) * 3
    dead_letters.record(conn, "one", [replace(LETTER, resource=body, resource_id="x\0\ud800" * 200)])
    [found] = stored(conn)
    assert dead_letters.read_resource(conn, found.id) == body
    with pytest.raises(KeyError):
        dead_letters.read_resource(conn, found.id + 1)


def test_what_did_not_fail_again_is_resolved_in_its_scope_only(conn: Session) -> None:
    letters = [replace(LETTER, resource=bytes([n])) for n in range(3)]
    elsewhere = [replace(LETTER, stage="load"), replace(LETTER, partition_key="w")]
    elsewhere.append(replace(LETTER, resource_type="Encounter"))
    dead_letters.record(conn, "one", letters + elsewhere)
    dead_letters.record(conn, "two", letters[:1])
    assert dead_letters.resolve_not_repeated(conn, "two", "Patient", "validate", ["2024-01-01"]) == 2
    assert len(stored(conn, Selection(status="open"))) == 4
    assert {each.resolved_run_id for each in stored(conn, Selection(status="resolved"))} == {"two"}
    dead_letters.record(conn, "three", letters)
    assert len(stored(conn, Selection(status="open"))) == 6
    assert all(each.resolved_at is None for each in stored(conn))


def test_a_discarded_letter_stays_discarded(conn: Session) -> None:
    dead_letters.record(conn, "one", [LETTER])
    conn.execute("UPDATE ops.dead_letters SET status = 'discarded'")
    dead_letters.record(conn, "two", [LETTER])
    dead_letters.resolve_not_repeated(conn, "three", "Patient", "validate", ["2024-01-01"])
    assert [(each.status, each.attempts) for each in stored(conn)] == [("discarded", 2)]


def test_letters_are_found_by_everything_people_ask_for_page_by_page(conn: Session) -> None:
    dead_letters.record(conn, "one", (replace(LETTER, resource=str(n).encode()) for n in range(12_000)))
    dead_letters.record(conn, "two", [replace(LETTER, stage="load", rule="unloadable", resource_type="Claim")])
    now = datetime.now(UTC)
    day = timedelta(days=1)
    for selection in (
        Selection(run_id="two"),
        Selection(stage="load"),
        Selection(rule="unloadable", since=now - day, until=now + day),
        Selection(resource_type="Claim", status="open", partition_keys=["2024-01-01"]),
    ):
        assert [each.resource_type for each in stored(conn, selection)] == ["Claim"]
    assert stored(conn, Selection(until=now - day)) == []
    seen: list[int] = []
    before = None
    while page := dead_letters.find(conn, Selection(run_id="one"), before=before, limit=5000):
        seen += [each.id for each in page]
        before = seen[-1]
    assert len(seen) == 12_000
    assert seen == sorted(set(seen), reverse=True)


def test_counts_say_which_rule_and_path_lead(conn: Session) -> None:
    dead_letters.record(conn, "one", [LETTER, replace(LETTER, resource=b"1"), LETTER])
    dead_letters.record(conn, "one", [replace(LETTER, resource=b"2", rule="json", path="f:1")])
    assert dead_letters.count_by_reason(conn, Selection(resource_type="Patient")) == [
        {"stage": "validate", "rule": "cardinality", "path": "Patient.name", "letters": 2, "occurrences": 3},
        {"stage": "validate", "rule": "json", "path": "f:1", "letters": 1, "occurrences": 1},
    ]


def test_record_now_outlives_the_callers_rollback(database: str, conn: Session) -> None:
    dead_letters.record(conn, "one", [replace(LETTER, resource=b"lost")])
    dead_letters.record_now(lambda: connect(database, cipher=NO_ENCRYPTION), "one", [LETTER])
    conn.rollback()
    assert [each.resource_id for each in stored(conn)] == ["a"]
