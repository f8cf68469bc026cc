"""Validation of published examples and Synthea data, and comparison with the package fhir.resources."""

import copy
import gzip
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from fhir_assets.catalog import CATALOG
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.fast_path import FastPath
from fhir_assets.fhir.validation.invariants import NOT_EVALUATED, SUBSUMED, compile_invariant
from fhir_assets.fhir.validation.rules import load_rules
from fhir_assets_tests.support.resource_samples import INVALID_VALUES, VALID_VALUES, Sampler, list_locations, to_bytes

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
VALIDATOR = Validator()
FAST_PATH = FastPath(VALIDATOR.max_depth)

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published data is not in {SHARED}")

ALLOWED = {b'"valueMeta"': "https://hl7.org/fhir/R4/datatypes.html#open lists Meta; fhir.resources has no valueMeta"}
"""Content that fhir.resources rejects although R4 allows it: a part of the JSON, and the reason."""


def read_lines(file: Path) -> Iterator[bytes]:
    yield from filter(None, gzip.decompress(file.read_bytes()).split(b"\n"))


@needs_shared
def test_all_published_examples_are_valid() -> None:
    results = [VALIDATOR.check(body) for body in read_lines(SHARED / "data/r4-examples/examples.ndjson.gz")]
    assert len(results) == 370
    assert [v.issues for v in results if not v.valid] == []
    warnings = Counter((issue.rule, issue.path) for v in results for issue in v.issues)
    assert warnings == {
        ("invariant:pdf-0", "PlanDefinition"): 3,
        ("invariant:txt-2", "EventDefinition.text.div"): 1,
        ("invariant:txt-2", "Questionnaire.text.div"): 1,
    }


@needs_shared
def test_synthea_data_is_valid_on_the_fast_path_and_in_the_walker() -> None:
    count = 0
    for file in sorted((SHARED / "data/synthea").glob("*.ndjson.gz")):
        for n, body in enumerate(read_lines(file)):
            assert FAST_PATH.accepts(body), (file.name, n)
            if n % 10 == 0:
                assert VALIDATOR.explain(body).issues == ()
            count += 1
    assert count == 8421


def test_every_invariant_is_compiled_subsumed_or_listed_as_not_evaluated() -> None:
    rules = load_rules()
    not_compiled = set()
    for name in rules.names():
        structure = rules.structure(name)
        resource = name.partition(".")[0]
        resource = resource if resource in rules.resource_types else "Patient"
        typed_rules = [(name, rule) for rule in structure.invariants]
        typed_rules += [(t, rule) for e in structure.elements.values() for t in e.types for rule in e.invariants]
        for type_, rule in typed_rules:
            if rule.key in SUBSUMED or rule.key in NOT_EVALUATED:
                continue
            path = None if structure.abstract else compile_invariant(rule.expression, type_, resource)
            if path is None and not structure.abstract:
                not_compiled.add(rule.key)
    assert not_compiled == set()
    by_severity = {rule.key: rule.severity for name in rules.names() for rule in rules.structure(name).invariants}
    assert all(by_severity[key] == "warning" for key in NOT_EVALUATED)


def fhir_resources_rejects(resource: dict[str, Any]) -> bool:
    name = resource["resourceType"]
    model = getattr(importlib.import_module(f"fhir.resources.R4B.{name.lower()}"), name)
    try:
        model.model_validate_json(to_bytes(resource))
    except (ValidationError, KeyError, ValueError, TypeError, AttributeError):
        return True
    return False


JUNK: list[Any] = [None, {}, [], [{}], *(v for values in VALID_VALUES.values() for v in values)]
JUNK += [v for values in INVALID_VALUES.values() for v in values]


@pytest.mark.parametrize("resource_type", [t.name for t in CATALOG])
def test_a_resource_that_fhir_resources_rejects_is_rejected(resource_type: str) -> None:
    accepted = 0
    for seed in range(40):
        random = Random(seed)
        resource = Sampler(random, random.random() * 0.6).resource(resource_type)
        for _ in range(3):
            mutant = copy.deepcopy(resource)
            container, key = random.choice(list_locations(mutant))
            container[key] = copy.deepcopy(random.choice(JUNK))
            body = to_bytes(mutant)
            if VALIDATOR.check(body).valid and mutant["resourceType"] == resource_type:
                accepted += 1
                assert any(part in body for part in ALLOWED) or not fhir_resources_rejects(mutant), (seed, key)
    assert accepted
