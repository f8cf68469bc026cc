"""The plans of ``make soak`` and ``make chaos``: drawn from a seed, kept, and made smaller."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fhir_assets_tests.support.soak import plan
from fhir_assets_tests.support.soak.faults import FAULTS
from fhir_assets_tests.support.soak.plan import Step


def _draw(seed: int, minutes: float = 60) -> list[Step]:
    return plan.draw(seed, minutes * 60, FAULTS, pause=20, longest=30)


def test_a_seed_draws_the_same_plan_again() -> None:
    assert _draw(5) == _draw(5) != _draw(6)


def test_every_fault_is_tried_equally_often_and_one_ends_before_the_next_begins() -> None:
    steps = _draw(5)
    counts = Counter(step.fault for step in steps)
    assert counts.keys() == FAULTS.keys()
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(step.at + step.seconds < later.at for step, later in pairwise(steps))
    assert steps[-1].at + steps[-1].seconds <= 3600


def test_a_plan_is_read_as_it_was_kept(tmp_path: Path) -> None:
    plan.save(_draw(5), tmp_path / "plan.jsonl")
    assert plan.read(tmp_path / "plan.jsonl") == _draw(5)


def test_a_failing_plan_is_made_as_small_as_it_can_be() -> None:
    steps = _draw(5)
    needed = {steps[3], steps[20], steps[-1]}
    tried: list[int] = []

    def fails(some: Sequence[Step]) -> bool:
        tried.append(len(some))
        return needed <= set(some)

    assert set(plan.shrink(steps, fails)) == needed
    assert len(tried) < 150
