"""Measure loads by processes that start cold, of more and more resources, and draw the seconds over the resources.

``python -m benchmarks.curve [--maximum RESOURCES] [--csv FILE] [--svg FILE]``. ``fhir-assets ingest`` with its default
settings and dlt load the same folder of five types over 91 days, in turn, as in ``benchmarks.cold_loads``. The CSV file
has one line for each load; ``--draw`` draws the chart of such a file again without measuring.
"""

import argparse
import csv
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cold_loads import load_cold, load_cold_peer, write
from benchmarks.machine import scratch
from benchmarks.processes import Spent
from fhir_assets.warehouse.postgres.db import embedded

COUNTS = (1_000, 10_000, 100_000, 1_000_000, 4_000_000)
MAXIMUM = 100_000
OURS, PEER = "fhir-assets", "dlt"

_FIELDS = ("name", "resources", "seconds", "own", "postgres", "peak_mib")
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 90, 20, 50
_COLORS = {OURS: "#2f81f7", PEER: "#d1661a"}
"""Colors that can be read on white and on black, as that of the text: a page does not tell an image its scheme."""


@dataclass(frozen=True, slots=True)
class Point:
    """One load: who loaded, how many resources, and what it spent."""

    name: str
    resources: int
    spent: Spent


def main(maximum: int, csv_path: Path | None, svg_path: Path | None) -> None:
    """Load and print the points, and write the files. They are written after each load, so that none is lost."""
    print(f"load {os.getloadavg()[0]:.1f}")
    points: list[Point] = []
    for path in filter(None, (csv_path, svg_path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    for count in (count for count in COUNTS if count <= maximum):
        with scratch() as folder:
            written = write(folder / "input", count)
            for name, work in ((OURS, load_cold), (PEER, load_cold_peer)):
                spent = work(folder / name, folder / "input")
                embedded.stop(folder / name)
                points.append(Point(name, written, spent))
                print(f"{written:>10,} resources  {name:<12} {spent}", flush=True)
                if csv_path:
                    write_csv(csv_path, points)
                if svg_path:
                    svg_path.write_text(draw(points))


def write_csv(path: Path, points: Iterable[Point]) -> None:
    """Write the points to a file, one line each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_FIELDS)
        for point in points:
            spent = point.spent
            figures = (spent.seconds, spent.own, spent.postgres, spent.peak_mib)
            writer.writerow([point.name, point.resources, *(f"{value:.2f}" for value in figures)])


def read_csv(path: Path) -> list[Point]:
    """Return the points of a file that ``write_csv`` wrote."""
    with path.open(newline="") as file:
        return [
            Point(row["name"], int(row["resources"]), Spent(*(float(row[name]) for name in _FIELDS[2:])))
            for row in csv.DictReader(file)
        ]


def draw(points: Sequence[Point]) -> str:
    """Return an SVG of the seconds over the resources, both axes logarithmic, with one line for each name."""
    across = _Axis([point.resources for point in points], _LEFT, _WIDTH - _RIGHT)
    up = _Axis([point.spent.seconds for point in points], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12" role="img">',
        "<title>Seconds of a cold load over its resources, both axes logarithmic</title>",
        "<style>text { fill: #6e7781 } .grid { stroke: #8b949e; stroke-opacity: 0.4 }</style>",
    ]
    for value in across.ticks():
        x = across.place(value)
        parts.append(f'<line class="grid" x1="{x:.0f}" y1="{_TOP}" x2="{x:.0f}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x:.0f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{value:,.0f}</text>')
    for value in up.ticks():
        y = up.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.0f}" x2="{_WIDTH - _RIGHT}" y2="{y:.0f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{value:,g} s</text>')
    for name, color in _COLORS.items():
        places = [(across.place(p.resources), up.place(p.spent.seconds)) for p in points if p.name == name]
        if not places:
            continue
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in places]
        x, y = places[-1]
        parts.append(f'<text x="{x + 8:.0f}" y="{y + 4:.0f}" style="fill: {color}">{name}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">resources</text>')
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """A logarithmic axis over whole decades around the values, from one place on the drawing to another."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        self._low = math.floor(math.log10(min(values)))
        self._high = max(math.ceil(math.log10(max(values))), self._low + 1)
        self._first, self._last = first, last

    def place(self, value: float) -> float:
        """Return the place of a value."""
        return self._first + (math.log10(value) - self._low) / (self._high - self._low) * (self._last - self._first)

    def ticks(self) -> list[float]:
        """Return the powers of ten."""
        return [10.0**exponent for exponent in range(self._low, self._high + 1)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maximum", type=int, default=MAXIMUM)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--draw", type=Path, metavar="CSV", help="Draw these points to --svg, without measuring")
    arguments = parser.parse_args()
    if arguments.draw:
        if not arguments.svg:
            parser.error("--draw needs --svg")
        arguments.svg.write_text(draw(read_csv(arguments.draw)))
        sys.exit()
    main(arguments.maximum, arguments.csv, arguments.svg)
