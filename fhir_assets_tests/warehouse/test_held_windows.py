"""``ops.held_windows``: a run releases only the records that it saw before it read the windows."""

import pytest

from fhir_assets.warehouse.ops import held_windows, window_verdicts
from fhir_assets.warehouse.postgres.db.connections import connect

THERE = "exports there"


@pytest.mark.parametrize("known", [False, True], ids=["first-hold", "held-before"])
def test_the_hold_of_a_load_that_commits_after_the_windows_were_read_stays(database: str, known: bool) -> None:
    with connect(database) as load, connect(database) as export:
        if known:
            held_windows.hold(load, THERE, "Patient", ["w"], run_id="earlier")
            load.commit()
        # The load waits with its hold, for the audit log for example, while a later export reads the windows.
        held_windows.hold(load, THERE, "Patient", ["w"], run_id="load")
        seen = held_windows.find_held(export, THERE, "Patient")
        assert list(seen) == ["w"] * known
        export.commit()
        load.commit()
        held_windows.release(export, THERE, "Patient", seen)
        export.commit()
        held = held_windows.find_held(export, THERE, "Patient")
        assert list(held) == ["w"]
        held_windows.release(export, THERE, "Patient", held)
        assert held_windows.find_held(export, THERE, "Patient") == {}


def test_windows_that_only_wait_are_not_listed_as_unreconciled(database: str) -> None:
    with connect(database) as conn:
        held_windows.hold(conn, THERE, "Patient", ["unknown", "passed", "failed", "changed"], run_id="run")
        faults = {"passed": (), "failed": ("1 is missing",), "changed": ("1 is missing",)}
        window_verdicts.record(conn, "Patient", faults, dict.fromkeys(faults, 0))
        window_verdicts.invalidate(conn, "Patient", ["changed"])
        assert held_windows.list_unreconciled(conn) == [(THERE, "Patient", "failed")]
        assert len(held_windows.list_held(conn)) == 4
