"""The numbers of rows by window after a load are the same, whether the load or Postgres counted them."""

import random

import pytest

from fhir_assets.pipeline.load.result import LoadResult
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.tables.loading import Loader
from fhir_assets.warehouse.postgres.tables.view_tables import NewWindow, count_rows_by_window, ensure_tables
from fhir_assets_tests.support.views import PATIENTS, build_rows, load, patient

WINDOWS = ("2024-01-01", "2024-01-02", "2024-01-03")


def load_at_random(conn: Session, seed: random.Random) -> LoadResult:
    """Load versions of a few patients into windows, in one run, and return what the run did."""
    ensure_tables(conn, PATIENTS)
    with conn.transaction():
        loader = Loader(conn, "Patient", PATIENTS, run_id="run")
        for _ in range(seed.randint(1, 8)):
            names = [{"family": "A"}] * seed.randint(0, 3)
            hour = seed.randint(0, 23)
            record = patient(f"p{seed.randint(0, 12)}", f"2024-01-05T{hour:02}:00:00Z", str(hour), name=names)
            loader.add([build_rows(PATIENTS, record)], seed.choice(WINDOWS))
        counts = loader.finish()
    return LoadResult(updated=counts.updated, rows=counts.rows, written=counts.written)


@pytest.mark.parametrize("seed", range(12))
def test_a_load_and_postgres_count_the_same_rows(conn: Session, seed: int) -> None:
    source = random.Random(seed)
    for _ in range(6):
        result = load_at_random(conn, source)
        counted = count_rows_by_window(conn, PATIENTS, "Patient", WINDOWS)
        assert count_rows_by_window(conn, PATIENTS, "Patient", WINDOWS, result.find_new_windows()) == counted
        conn.commit()


def test_the_rows_of_a_new_window_are_not_counted_again(conn: Session) -> None:
    counts, _ = load(conn, patient("a", name=[{"family": "A"}] * 2), patient("b"), key=WINDOWS[0])
    new = LoadResult(rows=counts.rows, written=counts.written).find_new_windows()
    assert new == {WINDOWS[0]: NewWindow(2, {"patient": 2, "patient_name": 2})}
    conn.execute("DELETE FROM fhir.patient_name")
    assert count_rows_by_window(conn, PATIENTS, "Patient", WINDOWS, new)["patient_name"] == {WINDOWS[0]: 2}
    assert count_rows_by_window(conn, PATIENTS, "Patient", WINDOWS)["patient_name"] == {}


def test_the_rows_of_a_window_with_earlier_resources_are_counted(conn: Session) -> None:
    load(conn, patient("a", name=[{"family": "A"}]), key=WINDOWS[0])
    counts, _ = load(conn, patient("b", name=[{"family": "B"}] * 2), key=WINDOWS[0])
    new = LoadResult(rows=counts.rows, written=counts.written).find_new_windows()
    assert new[WINDOWS[0]].rows["patient_name"] == 2
    assert count_rows_by_window(conn, PATIENTS, "Patient", WINDOWS, new)["patient_name"] == {WINDOWS[0]: 3}


def test_a_load_that_replaced_a_resource_leaves_counting_to_postgres(conn: Session) -> None:
    load(conn, patient("a", name=[{"family": "A"}]), key=WINDOWS[1])
    newer = patient("a", "2024-01-02T00:00:00Z", "2", name=[{"family": "A"}] * 2)
    counts, _ = load(conn, patient("b"), newer, key=WINDOWS[0])
    assert counts.updated == 1
    assert LoadResult(updated=1, rows=counts.rows, written=counts.written).find_new_windows() == {}
