"""The faults of window counts: each count that does not match is reported with the action that corrects it."""

from dataclasses import replace

import pytest

from fhir_assets.notices import Notice
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts

RECONCILED = WindowCounts(
    "2024-01-05",
    server_total=10,
    matched=10,
    repeated=1,
    rejected=1,
    raw=8,
    validated=8,
    valid=6,
    dead=2,
    not_loaded=1,
    missing=0,
)


def test_matching_counts_have_no_faults() -> None:
    assert RECONCILED.faults == []
    assert RECONCILED.loaded == 5


def test_an_unknown_server_total_is_no_fault() -> None:
    assert replace(RECONCILED, server_total=None).faults == []


def test_a_notice_of_severity_error_is_a_fault_and_a_warning_is_none() -> None:
    notices = (Notice("warning", "unsorted", "not sorted"), Notice("error", "incomplete", "some are missing"))
    counts = replace(RECONCILED, notices=notices)
    assert counts.faults == ["some are missing"]
    assert counts.warnings == ["not sorted"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"server_total": 12}, "the server counts 12 but returned 10: materialize raw"),
        ({"server_total": 9}, "the server counts 9 but returned 10: materialize raw"),
        ({"raw": 7, "validated": 7, "valid": 5}, "8 were received but raw holds 7"),
        ({"validated": 7, "valid": 5}, "raw holds 8 but 7 were validated"),
        ({"dead": 1}, "8 were validated but 6 are valid, 1 dead and 0 withheld"),
        ({"lost": 2}, "2 invalid resources are in no table and no dead letter: materialize validated"),
        ({"other_parts": True}, "the validated parts are not those of raw: materialize"),
        ({"missing": 3}, "3 valid resources are not in the tables: materialize normalized again"),
    ],
)
def test_a_count_that_does_not_match_is_one_fault_with_an_action(changed: dict[str, int], message: str) -> None:
    (fault,) = replace(RECONCILED, **changed).faults  # type: ignore[arg-type]
    assert fault.startswith(message)
    assert "materialize" in fault
