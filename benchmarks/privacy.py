"""Measure the cost of encryption and consent: Dagster runs load the same files plain, encrypted, and with consent.

``python -m benchmarks.privacy [resources] [rounds]``. The variants take turns, and each ratio compares loads of one
round, so that other work of the machine affects all variants alike. Processor time is the time of this process, its
workers and its Postgres. Every patient has a Consent that permits: under opt-in every resource is checked and no
resource is withheld in the end.
"""

import argparse
import gc
import gzip
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import orjson
from isal import igzip

from benchmarks import population
from benchmarks.deployment import load
from benchmarks.machine import scratch
from fhir_assets.privacy.keys import new_key

RESOURCES = 17_000
ROUNDS = 3
GOALS = {"encrypted": 1.35, "consent": 1.05}
"""Maximum ratio to the processor time of the plain load: encryption adds 35 % at most, consent 5 %."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The elapsed seconds and the processor seconds of one load."""

    wall: float
    processor: float


def main(resources: int = RESOURCES, rounds: int = ROUNDS) -> int:
    """Print the table. Return the number of missed goals."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "encrypted": {"phi_encryption_keys": new_key()},
        "consent": {"consent_policy": "opt-in"},
        "both": {"phi_encryption_keys": new_key(), "consent_policy": "opt-in"},
    }
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    with scratch() as folder:
        source = folder / "input"
        source.mkdir()
        written = population.write(source, resources)
        written += _permit_all(source)
        print(f"{written:,} resources, {rounds} rounds, load {os.getloadavg()[0]:.1f}")
        _cost(source, written, {})
        for number in range(rounds):
            for name, settings in _rotate(variants, number):
                costs[name].append(_cost(source, written, settings))
    print(f"{'':<12}{'wall':>9}{'processor':>11}{'ratio: wall':>17}{'processor':>11}")
    missed = 0
    for name, variant_costs in costs.items():
        walls = [cost.wall / plain.wall for cost, plain in zip(variant_costs, costs["plain"], strict=True)]
        processors = [
            cost.processor / plain.processor for cost, plain in zip(variant_costs, costs["plain"], strict=True)
        ]
        goal = GOALS.get(name)
        missed += goal is not None and median(processors) > goal
        print(
            f"{name:<12}{median(cost.wall for cost in variant_costs):>7.1f} s"
            f"{median(cost.processor for cost in variant_costs):>9.1f} s"
            f"{median(walls):>17.2f}{median(processors):>11.2f}{f'   goal {goal}' if goal else ''}",
            flush=True,
        )
    return missed


def _rotate(variants: dict[str, dict[str, Any]], number: int) -> Iterable[tuple[str, dict[str, Any]]]:
    """Return the variants in an order that begins with another one in each round."""
    items = list(variants.items())
    return items[number % len(items) :] + items[: number % len(items)]


def _permit_all(source: Path) -> int:
    """Add a Consent that permits for each patient of the input. Return their number."""
    lines = []
    with gzip.open(source / "Patient.ndjson.gz") as patients:
        for line in patients:
            patient = orjson.loads(line)
            consent = {
                "resourceType": "Consent",
                "id": f"consent-{patient['id']}"[:64],
                "meta": patient.get("meta", {}),
                "status": "active",
                "scope": {"coding": [{"code": "patient-privacy"}]},
                "category": [{"coding": [{"code": "59284-0"}]}],
                "policyRule": {"coding": [{"code": "OPTIN"}]},
                "patient": {"reference": f"Patient/{patient['id']}"},
                "provision": {"type": "permit"},
            }
            lines.append(orjson.dumps(consent))
    (source / "Consent.ndjson.gz").write_bytes(igzip.compress(b"\n".join([*lines, b""]), 1))
    return len(lines)


def _cost(source: Path, written: int, settings: dict[str, Any]) -> Cost:
    """Load into a deployment of its own and return the cost."""
    gc.collect()
    with scratch() as home:
        loaded = load(home, source, **settings)
        if loaded.resources != written:
            raise SystemExit(f"{loaded.resources} of {written} resources are in the tables: the figures are invalid")
        return Cost(loaded.seconds, loaded.processor)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", type=int, nargs="?", default=RESOURCES)
    parser.add_argument("rounds", type=int, nargs="?", default=ROUNDS)
    arguments = parser.parse_args()
    raise SystemExit(main(arguments.resources, arguments.rounds))
