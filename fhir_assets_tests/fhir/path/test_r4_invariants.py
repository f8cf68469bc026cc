"""The invariants of R4 as the compiler meets them: all compile, and the specification's own examples keep them."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import CompiledPath, compile_path

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="the R4 definitions are not at hand")

# A constraint on probability[x] that speaks of Range only, and R4's own slip: this resource has no name.
NOT_FOR = {("decimal", "ras-1"), ("ChargeItemDefinition", "cid-0")}


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


@cache
def constraints() -> dict[tuple[str, str], dict[str, CompiledPath]]:
    """By path and type of an element, its constraints; ele-1 of primitives is about the JSON, not about values."""
    found: dict[tuple[str, str], dict[str, CompiledPath]] = defaultdict(dict)
    model = r4()
    for definition in lines(SHARED / "fhir-r4" / "structure-definitions.ndjson.gz"):
        resource = definition["type"] if definition["kind"] == "resource" else None
        for element in definition["snapshot"]["element"]:
            path = element["path"]
            types = {path} if path in model.types else {type_["code"] for type_ in element.get("type", ())}
            for type_ in types & model.types.keys():
                for each in element.get("constraint", ()):
                    key = each["key"]
                    if (type_, key) in NOT_FOR or (key == "ele-1" and model.is_primitive(type_)):
                        continue
                    found[path, type_][key] = compile_path(
                        each["expression"],
                        root_type=type_,
                        resource_type=resource,
                        hooks={"htmlChecks": lambda _: True},
                    )
    return found


def test_every_invariant_compiles_without_a_fallback() -> None:
    compiled = [path for paths in constraints().values() for path in paths.values()]
    assert len(compiled) > 1000
    assert {path.expression for path in compiled if path.fallback} == set()
    assert all(callable(path.predicate) for path in {path.expression: path for path in compiled}.values())


@pytest.mark.parametrize("key", [("ChargeItemDefinition", "name.matches('x')"), ("decimal", "low.empty()")])
def test_an_invariant_about_an_element_that_is_not_there_is_refused(key: tuple[str, str]) -> None:
    with pytest.raises(FhirPathError, match="has no element"):
        compile_path(key[1], root_type=key[0])


def elements(item: dict[str, Any], type_: str, resource: dict[str, Any]) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """The resource and everything in it, with types and resources."""
    yield item, type_, resource
    for name, value in item.items():
        known = r4().types[type_].json.get(name)
        for each in (value if isinstance(value, list) else [value]) if known else ():
            assert known is not None
            if isinstance(each, dict):
                inner = each if "resourceType" in each else resource
                yield from elements(each, each.get("resourceType", known[1]), inner)


def test_the_examples_of_the_specification_keep_every_invariant_of_their_types() -> None:
    broken = set()
    checked = 0
    for resource in lines(SHARED / "data" / "r4-examples" / "examples.ndjson.gz"):
        for item, type_, owner in elements(resource, resource["resourceType"], resource):
            for key, path in constraints().get((type_, type_), {}).items():
                checked += 1
                if path.test(item, resource=owner, root=resource) is False:
                    broken.add(key)
    assert checked > 10_000
    # dom-6 and pdf-0 are warnings that some examples earn.
    assert broken <= {"dom-6", "pdf-0"}
