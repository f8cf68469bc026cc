"""The fast path accepts only resources without issues, and no input makes the validator raise."""

import copy
import json
from collections import deque
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fhir_assets.catalog import CATALOG
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.fast_invariants import SUFFICIENT_CONDITIONS
from fhir_assets.fhir.validation.fast_path import FastPath
from fhir_assets.fhir.validation.invariants import SUBSUMED
from fhir_assets.fhir.validation.rules import PRIMITIVES, Element
from fhir_assets_tests.support.resource_samples import (
    INVALID_VALUES,
    RULES,
    VALID_VALUES,
    Sampler,
    list_locations,
    to_bytes,
)

VALIDATOR = Validator()
FAST_PATH = FastPath(VALIDATOR.max_depth)
JUNK: list[Any] = [None, {}, [], [{}], {"id": "x"}, {"reference": "#"}]
JUNK += [value for values in (*VALID_VALUES.values(), *INVALID_VALUES.values()) for value in values]


def assert_agreement(body: bytes) -> tuple[bool, bool]:
    """Validate on both paths. Return whether the fast path accepts the body and whether the walker finds no issue."""
    accepted, issues = FAST_PATH.accepts(body), VALIDATOR.explain(body).issues
    assert not (accepted and issues), issues
    return accepted, not issues


@pytest.mark.parametrize("resource_type", [t.name for t in CATALOG])
def test_the_fast_path_accepts_only_random_resources_without_issues(resource_type: str) -> None:
    seen = set()
    for seed in range(60):
        random = Random(seed)
        resource = Sampler(random, random.random()).resource(resource_type)
        resource.pop("language", None)
        seen.add(assert_agreement(to_bytes(resource)))
        for _ in range(4):
            mutant = copy.deepcopy(resource)
            container, key = random.choice(list_locations(mutant))
            if random.random() < 0.2:
                del container[key]
            else:
                container[key] = copy.deepcopy(random.choice(JUNK))
            seen.add(assert_agreement(to_bytes(mutant)))
    assert {(True, True), (False, False)} <= seen


def test_random_resources_of_every_type_violate_invariants_only() -> None:
    for resource_type in sorted(RULES.resource_types):
        for seed in range(3):
            body = to_bytes(Sampler(Random(seed), seed / 4).resource(resource_type))
            rules = {issue.rule for issue in VALIDATOR.explain(body).issues}
            assert all(rule.startswith("invariant:") for rule in rules), (resource_type, rules)


def find_path_to(structure: str) -> tuple[str, list[tuple[str, Element, str]]]:
    """Return a resource type of the catalog and the shortest path of properties from it to a structure."""
    pending: deque[tuple[str, str, list[tuple[str, Element, str]]]] = deque((t.name, t.name, []) for t in CATALOG)
    seen: set[str] = set()
    while pending:
        root, current, path = pending.popleft()
        if current == structure:
            return root, path
        for name, (element, type_) in RULES.structure(current).properties.items():
            if type_ not in PRIMITIVES and type_ not in seen and type_ != "Resource":
                seen.add(type_)
                pending.append((root, type_, [*path, (name, element, type_)]))
    raise LookupError(structure)


def list_conditions() -> dict[str, str]:
    """Return each invariant with a sufficient condition, and a structure in the types of the catalog that has it."""
    structures: dict[str, str] = {}
    for name in RULES.names():
        structure = RULES.structure(name)
        for rule in structure.invariants:
            if rule.key in SUFFICIENT_CONDITIONS and not structure.abstract:
                try:
                    find_path_to(name)
                except LookupError:
                    continue
                structures.setdefault(rule.key, name)
        for element in structure.elements.values():
            structures.update({rule.key: name for rule in element.invariants if rule.key in SUFFICIENT_CONDITIONS})
    return structures


def accepted_resource(resource_type: str) -> dict[str, Any]:
    """Return a small resource that the fast path accepts."""
    for seed in range(200):
        resource = Sampler(Random(seed), 0.3).resource(resource_type)
        resource.pop("language", None)
        if FAST_PATH.accepts(to_bytes(resource)):
            return resource
    raise AssertionError(f"no {resource_type} accepted")


NEVER_ACCEPTED = {"drq-1", "drq-2", "exp-1", "trd-1"}
"""Invariants of structures that occur in TriggerDefinition only; its invariant trd-3 has no sufficient condition."""

NOT_VIOLATED_AT_RANDOM = {"con-2", "dom-3", "dom-4", "dom-5", "ext-1", "obs-7", "ppc-2", "ppc-3", "ppc-4", "ppc-5"}
"""Invariants that random resources do not violate; test_mutations and test_invariants violate them."""


@pytest.mark.parametrize(("key", "structure"), sorted(list_conditions().items()))
def test_a_sufficient_condition_implies_its_invariant(key: str, structure: str) -> None:
    root, path = find_path_to(structure)
    accepted, violated = 0, 0
    for seed in range(250):
        random = Random(seed)
        sampler = Sampler(random, random.choice([0.15, 0.4, 0.8]))
        resource = target = accepted_resource(root)
        for name, element, type_ in path:
            inner = sampler.complex(type_, 0)
            target[name] = [inner] if element.is_list else inner
            target = inner
        if not path:
            resource = target = sampler.resource(root)
        for strip in ("extension", "modifierExtension", "language", "text"):
            target.pop(strip, None)
        body = to_bytes(resource)
        accepted += assert_agreement(body)[0]
        violated += any(issue.rule == f"invariant:{key}" for issue in VALIDATOR.explain(body).issues)
    assert accepted or key in NEVER_ACCEPTED
    assert violated or key in NOT_VIOLATED_AT_RANDOM


def test_each_sufficient_condition_belongs_to_an_invariant() -> None:
    known = {rule.key for name in RULES.names() for rule in RULES.structure(name).invariants} | {
        rule.key for n in RULES.names() for e in RULES.structure(n).elements.values() for rule in e.invariants
    }
    assert set(SUFFICIENT_CONDITIONS) <= known
    assert not set(SUFFICIENT_CONDITIONS) & set(SUBSUMED)


def test_a_resource_nested_too_deeply_is_rejected_on_both_paths() -> None:
    deep: dict[str, Any] = {"url": "http://x.org", "valueString": "x"}
    for levels in range(1, 60):
        deep = {"url": "http://x.org", "extension": [deep]}
        body = to_bytes({"resourceType": "Patient", "extension": [deep]})
        too_deep = 2 * (levels + 1) + 1 > VALIDATOR.max_depth
        assert VALIDATOR.check(body).valid is not too_deep
        assert_agreement(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["resourceType", "id", "name", "_name", "contained", "extension", "meta", "code", "text", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_make_the_validator_raise(body: bytes) -> None:
    assert not VALIDATOR.check(body).valid


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["Patient", "Observation", "Bundle", "Parameters", "Questionnaire"]), JSON_VALUES)
def test_no_json_makes_the_validator_raise(resource_type: str, value: Any) -> None:
    resource = {"resourceType": resource_type, **(value if isinstance(value, dict) else {"name": value})}
    body = json.dumps(resource).encode()
    assert_agreement(body)
    result = VALIDATOR.check(body)
    assert result.resource is None or isinstance(result.resource, dict)


@settings(max_examples=300, deadline=None)
@given(st.integers(min_value=0, max_value=600), st.binary(min_size=1, max_size=4))
def test_no_damage_to_a_valid_resource_makes_the_validator_raise(at: int, damage: bytes) -> None:
    body = to_bytes(Sampler(Random(1), 0.5).resource("Patient"))
    assert_agreement(body[:at] + damage + body[at + 1 :])
