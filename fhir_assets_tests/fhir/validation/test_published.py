"""The published examples, Synthea's data and fhir.resources as the second opinion."""

import copy
import gzip
import importlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from fhir_assets.catalog import CATALOG
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.build_rules import build
from fhir_assets.fhir.validation.invariants import NOT_EVALUATED, SUBSUMED, compiled
from fhir_assets.fhir.validation.rules import RULES_FILE, load_rules
from fhir_assets_tests.fhir.validation.test_fast_path_agreement import nodes
from fhir_assets_tests.support.resource_samples import BAD, GOOD, Sampler, to_bytes

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
VALIDATOR = Validator()

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published data is not beside the repository")

ALLOWED = {b'"valueMeta"': "https://hl7.org/fhir/R4/datatypes.html#open lists Meta; fhir.resources has no valueMeta"}
"""What fhir.resources rejects and R4 allows: a mark of it in the JSON, and the specification's section."""


def lines(file: Path) -> Iterator[bytes]:
    yield from filter(None, gzip.decompress(file.read_bytes()).split(b"\n"))


@needs_shared
def test_all_published_examples_pass() -> None:
    results = [VALIDATOR.check(body) for body in lines(SHARED / "data/r4-examples/examples.ndjson.gz")]
    assert len(results) == 370
    assert [v.issues for v in results if not v.valid] == []
    warnings = Counter((issue.rule, issue.path) for v in results for issue in v.issues)
    assert warnings == {
        ("invariant:pdf-0", "PlanDefinition"): 3,
        ("invariant:txt-2", "EventDefinition.text.div"): 1,
        ("invariant:txt-2", "Questionnaire.text.div"): 1,
    }


@needs_shared
def test_synthea_passes_by_the_fast_path_and_by_the_walk() -> None:
    count = 0
    for file in sorted((SHARED / "data/synthea").glob("*.ndjson.gz")):
        for n, body in enumerate(lines(file)):
            assert VALIDATOR._fast.accepts(body), (file.name, n)
            if n % 10 == 0:
                assert VALIDATOR.explain(body).issues == ()
            count += 1
    assert count == 8421


@needs_shared
def test_the_rules_in_the_package_are_those_of_the_published_definitions() -> None:
    assert json.loads(gzip.decompress(RULES_FILE.read_bytes())) == build(SHARED / "fhir-r4")


def test_every_invariant_is_compiled_subsumed_or_named() -> None:
    rules = load_rules()
    left = set()
    for name in rules.names():
        structure = rules.structure(name)
        resource = name.partition(".")[0]
        resource = resource if resource in rules.resource_types else "Patient"
        found = [(name, rule) for rule in structure.invariants]
        found += [(t, rule) for e in structure.elements.values() for t in e.types for rule in e.invariants]
        for type_, rule in found:
            if rule.key in SUBSUMED or rule.key in NOT_EVALUATED:
                continue
            path = None if structure.abstract else compiled(rule.expression, type_, resource)
            if path is None and not structure.abstract:
                left.add(rule.key)
    assert left == set()
    by_severity = {rule.key: rule.severity for name in rules.names() for rule in rules.structure(name).invariants}
    assert all(by_severity[key] == "warning" for key in NOT_EVALUATED)


def other_rejects(resource: dict[str, Any]) -> bool:
    name = resource["resourceType"]
    model = getattr(importlib.import_module(f"fhir.resources.R4B.{name.lower()}"), name)
    try:
        model.model_validate_json(to_bytes(resource))
    except (ValidationError, KeyError, ValueError, TypeError, AttributeError):
        return True
    return False


JUNK: list[Any] = [None, {}, [], [{}], *(v for values in GOOD.values() for v in values)]
JUNK += [v for values in BAD.values() for v in values]


@pytest.mark.parametrize("resource_type", [t.name for t in CATALOG])
def test_what_fhir_resources_rejects_is_rejected(resource_type: str) -> None:
    accepted = 0
    for seed in range(40):
        random = Random(seed)
        resource = Sampler(random, random.random() * 0.6).resource(resource_type)
        for _ in range(3):
            mutant = copy.deepcopy(resource)
            holder, key = random.choice(nodes(mutant))
            holder[key] = copy.deepcopy(random.choice(JUNK))
            body = to_bytes(mutant)
            if VALIDATOR.check(body).valid and mutant["resourceType"] == resource_type:
                accepted += 1
                assert any(mark in body for mark in ALLOWED) or not other_rejects(mutant), (seed, key)
    assert accepted
