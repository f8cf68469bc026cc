"""A load and a replay of the same window at once: no dead letter is closed that the other one recorded again."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.pipeline import partition_commit
from fhir_assets.pipeline.load.step import LoadStep
from fhir_assets.pipeline.receive import receiver
from fhir_assets.warehouse.ops import audit_log, dead_letter_resolution, dead_letters, received, replays, retention
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets_tests.support.interleaving import Point, interleave
from fhir_assets_tests.support.small_hospital import KEY, SmallHospital, build_patient

VALID = {f"p{n}" for n in range(3)}
INVALID = {"bad0", "bad1"}

LOAD_POINTS = {
    "before it records dead letters": Point(dead_letters, "record_now"),
    "after it recorded dead letters": Point(partition_commit, "rewrite_partitions"),
    "when it has written the manifest": Point(partition_commit, "resolve_dead_letters"),
    "before it loads": Point(LoadStep, "run"),
    "before its load is committed": Point(audit_log, "record"),
}
REPLAY_POINTS = {
    "when it has claimed": Point(replays, "stream_claimed"),
    "when it has recorded failures": Point(partition_commit, "rewrite_partitions"),
    "before it loads": Point(LoadStep, "run"),
    "before it resolves": Point(replays, "resolve_claimed"),
}


@pytest.fixture
def hospital(database: str, tmp_path: Path) -> SmallHospital:
    """Two invalid patients, of whom ``bad0`` was corrected by hand, and three valid ones that are loaded."""
    hospital = SmallHospital(database, tmp_path)
    hospital.receive(*(build_patient(key) for key in sorted(VALID)), origin="test:1")
    hospital.receive(*(build_patient(key, gender="wrong") for key in sorted(INVALID)), origin="test:2")
    hospital.load("first")
    assert hospital.find_unresolved() == INVALID
    hospital.correct("bad0", gender="female")
    return hospital


def assert_nothing_is_lost(hospital: SmallHospital) -> None:
    """Assert that every patient is loaded or an unresolved dead letter, and that a further replay resolves the rest."""
    loaded, unresolved = hospital.find_loaded(), hospital.find_unresolved()
    assert loaded.keys() | unresolved == VALID | INVALID
    assert "bad1" in unresolved
    assert hospital.count_window().faults == []
    hospital.replay("last")
    assert hospital.find_loaded() == {**dict.fromkeys(VALID, "male"), "bad0": "female"}
    assert hospital.find_unresolved() == {"bad1"}
    counts = hospital.count_window()
    assert (counts.faults, counts.valid, counts.dead) == ([], 4, 1)


def run(
    hospital: SmallHospital,
    monkeypatch: pytest.MonkeyPatch,
    first: Callable[[], None],
    point: Point,
    second: Callable[[], None],
    *,
    kill: bool,
) -> None:
    outcome = interleave(hospital.url, monkeypatch, first, point, second, kill=kill)
    outcome.raise_errors()
    assert_nothing_is_lost(hospital)


@pytest.mark.parametrize("kill", [False, True], ids=["both end", "the load is killed"])
@pytest.mark.parametrize("point", LOAD_POINTS)
def test_a_replay_during_a_load_loses_no_dead_letter(
    hospital: SmallHospital, monkeypatch: pytest.MonkeyPatch, point: str, kill: bool
) -> None:
    run(hospital, monkeypatch, hospital.load, LOAD_POINTS[point], hospital.replay, kill=kill)


@pytest.mark.parametrize("kill", [False, True], ids=["both end", "the replay is killed"])
@pytest.mark.parametrize("point", REPLAY_POINTS)
def test_a_load_during_a_replay_loses_no_dead_letter(
    hospital: SmallHospital, monkeypatch: pytest.MonkeyPatch, point: str, kill: bool
) -> None:
    run(hospital, monkeypatch, hospital.replay, REPLAY_POINTS[point], hospital.load, kill=kill)


@pytest.mark.parametrize("point", LOAD_POINTS)
def test_two_loads_of_the_same_window_lose_no_dead_letter(
    hospital: SmallHospital, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    run(hospital, monkeypatch, hospital.load, LOAD_POINTS[point], lambda: hospital.load("other"), kill=False)


@pytest.mark.parametrize("point", REPLAY_POINTS)
def test_two_replays_of_the_same_dead_letters_store_no_resource_twice(
    hospital: SmallHospital, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    run(hospital, monkeypatch, hospital.replay, REPLAY_POINTS[point], lambda: hospital.replay("other"), kill=False)


def test_a_replay_whose_sign_of_life_is_lost_is_resolved_by_the_next_one(
    hospital: SmallHospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run takes over its dead letters while it still works on them, and both add them to the partition."""

    def replay() -> None:
        with hospital.connect() as conn:
            replays.request_replay(conn, Selection(), claimed_by="lost")
        hospital.replay_claimed("lost")

    point = REPLAY_POINTS["when it has recorded failures"]
    outcome = interleave(hospital.url, monkeypatch, replay, point, lambda: hospital.replay("other"))
    outcome.raise_errors()
    assert any("more dead letters" in warning for warning in hospital.count_window().warnings)
    assert_nothing_is_lost(hospital)


def test_a_receipt_whose_session_is_lost_commits_nothing(
    hospital: SmallHospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of the origin is released with the session, and another process receives the origin."""

    def receive() -> None:
        hospital.receive(build_patient("p9"), origin="test:9")

    def end_session() -> None:
        with hospital.connect() as conn:
            conn.execute(
                """
                SELECT pg_terminate_backend(pid)
                FROM pg_locks
                WHERE locktype = 'advisory' AND classid::bigint = %s AND granted
                """,
                [advisory_locks.RECEIVED_ORIGIN],
            )
            conn.commit()

    point = Point(receiver, "_require_lock")
    outcome = interleave(hospital.url, monkeypatch, receive, point, receive, break_connections=end_session)
    assert outcome.waited
    assert isinstance(outcome.errors[0], DatabaseUnavailable)
    assert outcome.errors[1] is None
    hospital.extend()
    assert hospital.count_window().faults == []
    manifest = hospital.store.manifest("raw", "Patient", KEY)
    assert manifest
    assert [receipt.rows for receipt in manifest.receipts if receipt.origin == "test:9"] == [1]
    with hospital.connect() as conn:
        assert received.find_pending(conn) == []


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM ops.dead_letters WHERE resource_id = 'bad1'",
        "UPDATE ops.dead_letters SET status = 'resolved', resolution = 'replayed' WHERE resource_id = 'bad1'",
    ],
)
def test_a_dead_letter_that_is_gone_is_red_until_its_window_is_validated_again(
    hospital: SmallHospital, statement: str
) -> None:
    assert hospital.count_window().faults == []
    with hospital.connect() as conn:
        conn.execute(statement.encode())
    (fault,) = hospital.count_window().faults
    assert fault.startswith("1 invalid resources are in no table and no dead letter: materialize validated")
    hospital.load("again")
    assert hospital.count_window().faults == []
    assert "bad1" in hospital.find_unresolved()


def test_a_dead_letter_without_an_id_is_counted_itself(database: str, tmp_path: Path) -> None:
    hospital = SmallHospital(database, tmp_path)
    nameless = [{**build_patient("x"), "birthDate": f"day {n}"} for n in range(2)]
    for patient in nameless:
        del patient["id"]
    hospital.receive(*nameless, origin="test:1")
    hospital.load("first")
    assert hospital.count_window().faults == []
    with hospital.connect() as conn:
        conn.execute("DELETE FROM ops.dead_letters WHERE id = (SELECT min(id) FROM ops.dead_letters)")
    assert len(hospital.count_window().faults) == 1


def test_a_superseded_dead_letter_accounts_for_its_resource_also_when_it_is_pruned(hospital: SmallHospital) -> None:
    hospital.receive(build_patient("bad1", version=2, gender="other"), origin="test:3")
    hospital.extend()
    assert hospital.find_dead_letter("bad1").resolution == dead_letter_resolution.SUPERSEDED
    assert (hospital.count_window().faults, hospital.count_window().dead) == ([], 2)
    with hospital.connect() as conn:
        assert retention.delete_expired_rows(conn, "dead_letters", datetime.now(UTC)) == 1
    assert hospital.count_window().faults == []
    hospital.replay()
    assert hospital.count_window().faults == []
    assert hospital.find_unresolved() == set()


def test_other_parts_than_those_of_raw_are_red(hospital: SmallHospital) -> None:
    manifest = hospital.store.manifest("raw", "Patient", KEY)
    assert manifest
    renamed = [msgspec.structs.replace(part, name=part.name.replace("/part-", "/other-")) for part in manifest.parts]
    for part, other in zip(manifest.parts, renamed, strict=True):
        content = hospital.store.blobs.get(part.name)
        assert content
        hospital.store.blobs.put(other.name, content)
    hospital.store.commit([msgspec.structs.replace(manifest, parts=tuple(renamed))])
    assert hospital.count_window().faults == ["the validated parts are not those of raw: materialize validated again"]
