"""The rows of runs in ops.ingestion_runs: status, counts, sums, and the detection of dead runs."""

from datetime import UTC, datetime, timedelta

import pytest

from fhir_assets.warehouse.ops import checkpoints, liveness, runs
from fhir_assets.warehouse.postgres.db.connections import Connection, connect
from fhir_assets_tests.support.views import select

NOW = datetime(2024, 3, 1, tzinfo=UTC)
KEYS = [f"2024-01-{day:02}" for day in range(1, 31)]
TYPES = ["Patient", "Observation"]
STATUS = "SELECT DISTINCT resource_type, status FROM ops.ingestion_runs ORDER BY 1, 2"


def start(conn: Connection, run_id: str = "one", at: datetime = NOW) -> None:
    runs.start(conn, run_id, TYPES, KEYS, triggered_by="schedule", at=at)


def test_a_run_goes_from_running_to_success_or_failed_by_type(conn: Connection) -> None:
    start(conn)
    assert select(conn, "SELECT count(*) FROM ops.ingestion_runs WHERE status = 'RUNNING'") == [(60,)]
    runs.finish(conn, "one", ["Patient"], KEYS)
    runs.fail(conn, "one", ["Observation"], KEYS, error="the disk\0is full", seconds=1.5)
    runs.finish(conn, "one", ["Observation"], KEYS)
    assert select(conn, STATUS) == [("Observation", "FAILED"), ("Patient", "SUCCESS")]
    assert runs.get_errors(conn, "one") == {"the disk�is full": ["Observation"]}
    assert select(conn, "SELECT DISTINCT seconds FROM ops.ingestion_runs WHERE status = 'FAILED'") == [(1.5,)]


def test_a_retried_step_has_status_running_again(conn: Connection) -> None:
    start(conn)
    runs.fail(conn, "one", TYPES, KEYS, error="down")
    start(conn, at=NOW + timedelta(hours=1))
    assert select(conn, "SELECT DISTINCT status, error, finished_at, started_at FROM ops.ingestion_runs") == [
        ("RUNNING", None, None, NOW)
    ]


def test_counts_are_recorded_by_layer_and_summed_in_load_order(conn: Connection) -> None:
    start(conn)
    runs.record_counts(conn, "one", "Patient", {key: {"server_total": None, "fetched": 10} for key in KEYS})
    runs.record_counts(conn, "one", "Patient", {KEYS[0]: {"valid": 9, "dead": 1}, KEYS[1]: {"valid": 10, "dead": 0}})
    runs.record_counts(conn, "one", "Patient", {KEYS[0]: {"loaded": 9}})
    runs.record_counts(conn, "one", "Observation", {KEYS[0]: {"fetched": 5, "loaded": 4}})
    runs.finish(conn, "one", TYPES, KEYS)
    rows = runs.summarize(conn, ["one"])
    assert [(row["type"], row["fetched"], row["valid"], row["dead"], row["loaded"]) for row in rows] == [
        ("Patient", 300, 19, 1, 9),
        ("Observation", 5, None, None, 4),
        ("total", 305, 19, 1, 13),
    ]
    assert select(conn, "SELECT server_total FROM ops.ingestion_runs WHERE fetched = 10 LIMIT 1") == [(None,)]
    with pytest.raises(ValueError, match="felled"):
        runs.record_counts(conn, "one", "Patient", {KEYS[0]: {"felled": 1}})


def test_a_run_without_counts_has_no_summary(conn: Connection) -> None:
    start(conn)
    runs.finish(conn, "one", TYPES, KEYS)
    assert runs.summarize(conn, ["one"]) == []


def test_dead_runs_are_marked_as_failed_and_living_runs_are_not(conn: Connection, database: str) -> None:
    for run_id in ("dead", "living", "done"):
        start(conn, run_id)
    runs.finish(conn, "done", TYPES, KEYS)
    with connect(database, autocommit=True) as process, connect(database, autocommit=True) as another_step:
        liveness.hold_liveness_lock(process, "living")
        liveness.hold_liveness_lock(another_step, "living")
        process.close()
        assert liveness.find_alive(conn, ["dead", "living", "done"]) == {"living"}
        assert runs.abandon_dead(conn) == 60
    assert select(conn, "SELECT DISTINCT run_id, status FROM ops.ingestion_runs ORDER BY 1") == [
        ("dead", "FAILED"),
        ("done", "SUCCESS"),
        ("living", "RUNNING"),
    ]
    assert runs.abandon(conn, "living", error="killed") == 60
    assert runs.abandon_dead(conn) == 0


def test_a_run_records_the_checkpoint_before_and_after(conn: Connection) -> None:
    checkpoints.begin(conn, ["Patient"], NOW, source_state=None)
    start(conn)
    checkpoints.advance(conn, "Patient", NOW, NOW + timedelta(days=1), "one")
    runs.finish(conn, "one", TYPES, KEYS)
    query = "SELECT DISTINCT resource_type, checkpoint_before, checkpoint_after FROM ops.ingestion_runs ORDER BY 1"
    assert select(conn, query) == [("Observation", None, None), ("Patient", NOW, NOW + timedelta(days=1))]
