"""What a balance calls a fault."""

from dataclasses import replace

import pytest

from fhir_assets.pipeline.reconcile.window_counts import WindowCounts

GOOD = WindowCounts(
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


def test_a_window_in_which_everything_stands_somewhere_has_no_faults() -> None:
    assert GOOD.faults == []
    assert GOOD.loaded == 5


def test_a_source_that_cannot_count_is_no_fault() -> None:
    assert replace(GOOD, server_total=None).faults == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"server_total": 12}, "the server counts 12 but returned 10: materialize raw"),
        ({"server_total": 9}, "the server counts 9 but returned 10: materialize raw"),
        ({"raw": 7, "validated": 7, "valid": 5}, "8 were received but raw holds 7"),
        ({"validated": 7, "valid": 5}, "raw holds 8 but 7 were validated"),
        ({"dead": 1}, "8 were validated but 6 are valid, 1 dead and 0 withheld"),
        ({"missing": 3}, "3 valid resources are not in the tables: materialize normalized again"),
    ],
)
def test_each_number_that_is_off_is_one_fault_with_what_to_do(changed: dict[str, int], said: str) -> None:
    (fault,) = replace(GOOD, **changed).faults  # type: ignore[arg-type]
    assert fault.startswith(said)
    assert "materialize" in fault
