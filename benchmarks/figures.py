"""The figures that have a goal: what a benchmark measured, its goal, and what it cost beside a peer.

A benchmark passes its figures to ``report``, which prints them and returns the exit code. ``python -m benchmarks``
collects those of all benchmarks, each in a process of its own, through the file that ``COLLECTED`` names.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.processes import Spent

COLLECTED = "BENCHMARK_FIGURES"
"""The environment variable with the path of the file to which ``report`` appends."""

_HEAD = "| goal | work | figure | goal | | ours | peer | ratio |"


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value and its limit. ``goal`` is the number of the goal in the issue of speed.

    ``unit`` is written after the value: ``" s"``, or ``" times dlt"``. ``ours`` and ``peer`` are what the two sides
    spent, where the benchmark knows it; ``peer_name`` says who the peer is.
    """

    goal: int
    work: str
    value: float
    limit: float | None
    """None for a figure without a goal, which the table shows beside those that have one."""
    unit: str = ""
    at_least: bool = False
    """Whether the value must reach the limit; otherwise it must not exceed it."""
    ours: Spent | None = None
    peer: Spent | None = None
    peer_name: str = ""

    @property
    def held(self) -> bool:
        """Whether the goal holds. A value that is not a number misses it."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        figure = f"goal {self.goal}: {self.work}: {_number(self.value)}{self.unit}"
        if self.limit is None:
            return figure
        bound = "at least" if self.at_least else "at most"
        state = "held" if self.held else "MISSED"
        return f"{figure} ({bound} {self.limit:g}): {state}"


def report(*figures: Figure) -> int:
    """Print the figures, and append them to the file of ``COLLECTED``. Return 1 if a goal is missed, else 0."""
    path = os.environ.get(COLLECTED)
    for figure in figures:
        print(figure, flush=True)
        if path:
            with Path(path).open("a") as file:
                file.write(json.dumps(asdict(figure)) + "\n")
    return int(not all(figure.held for figure in figures))


def collect(path: Path) -> list[Figure]:
    """Return the figures of a file that ``report`` wrote, by the number of their goal."""
    return sorted(map(_read, path.read_text().splitlines()), key=lambda figure: figure.goal)


def render(figures: Sequence[Figure]) -> str:
    """Return a Markdown table: each figure with its goal, what both sides spent, and the ratio of the seconds."""
    rows = [_HEAD, "|---|---|---|---|---|---|---|---|"]
    for figure in figures:
        ratio = f"{figure.peer.seconds / figure.ours.seconds:.2f}" if figure.ours and figure.peer else ""
        peer = f"{figure.peer_name}: {figure.peer}" if figure.peer else figure.peer_name
        if figure.limit is None:
            goal, state = "", ""
        else:
            goal, state = f"{'≥' if figure.at_least else '≤'} {figure.limit:g}", "held" if figure.held else "**missed**"
        rows.append(
            f"| {figure.goal} | {figure.work} | {_number(figure.value)}{figure.unit} | {goal} | {state} "
            f"| {figure.ours or ''} | {peer} | {ratio} |"
        )
    return "\n".join(rows)


def _read(line: str) -> Figure:
    values = json.loads(line)
    for side in ("ours", "peer"):
        values[side] = Spent(**values[side]) if values[side] else None
    return Figure(**values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
