"""Generates a synthetic population: linked, plausible resources of all types of the catalog, reproducible by seed.

``generate`` yields resources, ``write_population`` writes files ``<Type>.ndjson.gz``. A share of the resources can be
given known defects (``synthetic/defects.py``) without changing the other resources.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import NamedTuple

import orjson
from isal import igzip

from fhir_assets.atomic_files import build_temporary_path, replace_file
from fhir_assets.catalog import CATALOG
from fhir_assets.sandbox.dates import to_microseconds
from fhir_assets.sandbox.synthetic.care import (
    generate_care_plan,
    generate_consent,
    generate_provenance,
    generate_service_request,
)
from fhir_assets.sandbox.synthetic.clinical import (
    choose_disorder,
    generate_allergies,
    generate_condition,
    generate_document,
    generate_encounter,
    generate_procedure,
    plan_visits,
)
from fhir_assets.sandbox.synthetic.codes import EMERGENCY, PANELS
from fhir_assets.sandbox.synthetic.defects import Defect, break_resource
from fhir_assets.sandbox.synthetic.diagnostics import (
    generate_body_measurements,
    generate_imaging_study,
    generate_laboratory_report,
    generate_vital_signs,
)
from fhir_assets.sandbox.synthetic.facility import generate_facility
from fhir_assets.sandbox.synthetic.financial import generate_claim, generate_coverage
from fhir_assets.sandbox.synthetic.people import Person, Resources, generate_patient, make_person, pick
from fhir_assets.sandbox.synthetic.treatment import generate_device, generate_immunization, generate_medication

DEFAULT_DAYS = 90
DEFECTS_FILE = ".defects.json"


class Item(NamedTuple):
    """A resource of a population. ``defect`` is its defect; None if it is valid."""

    resource_type: str
    body: bytes
    defect: Defect | None


@dataclass(frozen=True, slots=True)
class Population:
    """A population of ``patients``, with ``lastUpdated`` spread from ``start`` to ``end`` (half-open, UTC).

    The default range is the 90 days before the last midnight UTC. Set ``start`` and ``end`` to get the same resources
    on different days. A patient's resources do not depend on the number of patients. ``bad_share`` is the share of
    resources with a defect, from 0 to 1.
    """

    patients: int
    seed: int = 1
    bad_share: float = 0.0
    end: datetime = field(default_factory=lambda: datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0))
    start: datetime | None = None

    def __iter__(self) -> Iterator[Item]:
        """Yield all resources: first the shared resources, then those of each patient."""
        name = f"syn{self.seed}"
        end = to_microseconds(self.end) // 1000
        start = to_microseconds(self.start or self.end - timedelta(days=DEFAULT_DAYS)) // 1000
        yield from self._finish(generate_facility(name, start, end), Random(f"{name}:bad:facility"))
        for number in range(self.patients):
            person = make_person(name, number, start, end)
            yield from self._finish(_generate_record(person, start), Random(f"{name}:bad:{number}"))

    def _finish(self, resources: Resources, random: Random) -> Iterator[Item]:
        for resource_type, text in resources:
            body = text.encode()
            if self.bad_share and random.random() < self.bad_share:
                defect, body = break_resource(resource_type, body, random)
                yield Item(resource_type, body, defect)
            else:
                yield Item(resource_type, body, None)


def _generate_record(person: Person, first_ms: int) -> Resources:
    """Yield all resources of one patient."""
    random = person.random
    visits = plan_visits(person, first_ms)
    yield from generate_patient(person, max(visit.end for visit in visits))
    coverage_id = person.new_id("cov")
    yield from generate_coverage(person, coverage_id)
    yield from generate_allergies(person)
    chronic_seen = False
    for n, visit in enumerate(visits):
        disorder = choose_disorder(person) if random.random() < 0.6 else None
        condition_id = person.new_id("c") if disorder else None
        yield from generate_encounter(person, visit, condition_id)
        if n == 0:
            yield from generate_consent(person, visit)
        recorded = [f"Encounter/{visit.id}"]
        if disorder is not None and condition_id is not None:
            yield from generate_condition(person, visit, disorder, condition_id)
            recorded.append(f"Condition/{condition_id}")
            yield from generate_medication(person, visit, disorder, condition_id)
            if disorder.chronic and not chronic_seen:
                chronic_seen = True
                yield from generate_care_plan(person, visit, condition_id)
        yield from generate_vital_signs(person, visit)
        if n == 0 or random.random() < 0.2:
            yield from generate_body_measurements(person, visit)
        request = None
        if random.random() < 0.3:
            request = person.new_id("sr")
            panel = pick(random, PANELS)
            yield from generate_service_request(person, visit, request, panel)
            yield from generate_laboratory_report(person, visit, request, panel)
        if random.random() < 0.5:
            yield from generate_procedure(person, visit, request)
        if random.random() < 0.3:
            yield from generate_immunization(person, visit)
        if visit.kind_index >= EMERGENCY and random.random() < 0.4:
            yield from generate_imaging_study(person, visit)
        if random.random() < 0.05:
            yield from generate_device(person, visit)
        yield from generate_document(person, visit, disorder)
        yield from generate_claim(person, visit, coverage_id, condition_id)
        yield from generate_provenance(person, visit, recorded)


def generate(
    patients: int,
    seed: int = 1,
    bad_share: float = 0.0,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Yield the resources of a population as type and JSON. Population describes the arguments."""
    population = Population(patients, seed, bad_share, start=start, **({"end": end} if end else {}))
    return ((item.resource_type, item.body) for item in population)


@dataclass(slots=True)
class Summary:
    """The numbers of written resources by type, and of resources with a defect by type and by defect."""

    resources: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    defects: Counter[str] = field(default_factory=Counter)


class _Part:
    """A gzip file that is written member by member and renamed to its final name when it is complete.

    It is not open between the members, because a population has more files than a process may have open.
    """

    _BLOCK = 2**20

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unfinished = build_temporary_path(path)
        self._lines: list[bytes] = []
        self._buffered = 0

    def write(self, line: bytes) -> None:
        self._lines.append(line)
        self._buffered += len(line)
        if self._buffered >= self._BLOCK:
            self._flush()

    def finish(self) -> None:
        """Write the rest and flush the file to the disk."""
        self._flush()
        with self._unfinished.open("rb") as file:
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Rename the finished file to its final name."""
        self._unfinished.replace(self._path)

    def discard(self) -> None:
        """Delete the file if it has not been published."""
        self._unfinished.unlink(missing_ok=True)

    def _flush(self) -> None:
        block = b"\n".join([*self._lines, b""])
        with self._unfinished.open("ab") as file:
            file.write(igzip.compress(block, 1))
        self._lines, self._buffered = [], 0


def write_population(folder: Path, population: Population) -> Summary:
    """Write ``<Type>.ndjson.gz`` for every type, then ``.defects.json`` with each defective resource and its rule.

    The files of an earlier population are replaced when all files are complete. If the folder cannot be written, these
    files are unchanged, and OSError is raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {t.name: _Part(folder / f"{t.name}.ndjson.gz") for t in CATALOG}
    defects = folder / DEFECTS_FILE
    try:
        with replace_file(defects) as file:
            summary, broken = _write_parts(parts, population)
            file.write(orjson.dumps(broken))
            file.flush()
            # Without the file of defects, the population is incomplete.
            defects.unlink(missing_ok=True)
            for part in parts.values():
                part.publish()
    finally:
        for part in parts.values():
            part.discard()
    return summary


def _write_parts(parts: Mapping[str, _Part], population: Population) -> tuple[Summary, list[dict[str, str]]]:
    """Write the resources to unfinished files. Return their numbers, and the defective ones."""
    summary = Summary()
    broken: list[dict[str, str]] = []
    for resource_type, body, defect in population:
        parts[resource_type].write(body)
        summary.resources[resource_type] += 1
        if defect is not None:
            summary.bad[resource_type] += 1
            summary.defects[defect.name] += 1
            resource_id = orjson.loads(body)["id"]
            broken.append(
                {"resourceType": resource_type, "id": resource_id, "defect": defect.name, "rule": defect.rule}
            )
    for part in parts.values():
        part.finish()
    return summary, broken
