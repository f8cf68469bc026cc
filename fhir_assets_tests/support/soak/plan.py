"""Plans of faults: drawn from a seed, kept as JSON, and made smaller while they still find a fault."""

import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Step:
    """One fault: when it begins and for how long it lasts, in seconds; ``choice`` picks its victim."""

    at: float
    fault: str
    seconds: float
    choice: int


def draw(seed: int, seconds: float, faults: Collection[str], *, pause: float, longest: float) -> list[Step]:
    """Draw faults, one after the other, that have all ended after ``seconds``.

    Each lasts at most ``longest`` seconds; ``pause`` is the mean time between two. All faults come equally often.
    """
    source = random.Random(seed)
    steps: list[Step] = []
    at, remaining = source.uniform(0.5, 1.0) * pause, list[str]()
    while at + longest < seconds:
        remaining = remaining or source.sample(sorted(faults), len(faults))
        step = Step(round(at, 1), remaining.pop(), round(source.uniform(0.2, 1.0) * longest, 1), source.randrange(1000))
        steps.append(step)
        at = step.at + step.seconds + source.uniform(0.5, 1.5) * pause
    return steps


def save(steps: Sequence[Step], path: Path) -> None:
    """Write a plan, one step a line."""
    path.write_text("".join(json.dumps(asdict(step)) + "\n" for step in steps))


def read(path: Path) -> list[Step]:
    """Read a plan that ``save`` has written, or a part of its lines."""
    return [Step(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]


def shrink(steps: Sequence[Step], fails: Callable[[Sequence[Step]], bool]) -> list[Step]:
    """Return the fewest steps found that still fail: halves are left out, then quarters, then single steps."""
    found, parts = list(steps), 2
    while len(found) > 1:
        size = max(1, len(found) // parts)
        for begin in range(0, len(found), size):
            rest = found[:begin] + found[begin + size :]
            if rest and fails(rest):
                found, parts = rest, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts *= 2
    return found
