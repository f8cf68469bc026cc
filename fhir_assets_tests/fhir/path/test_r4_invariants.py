"""All invariants of R4 compile, and the examples of the specification satisfy them."""

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
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason=f"the R4 definitions are not in {SHARED}")

# ras-1 constrains probability[x] but applies to Range only; cid-0 refers to an element that R4 does not define.
NOT_APPLICABLE = {("decimal", "ras-1"), ("ChargeItemDefinition", "cid-0")}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


@cache
def compile_constraints() -> dict[tuple[str, str], dict[str, CompiledPath]]:
    """Return the compiled constraints by path and type of the element.

    ele-1 of primitives is left out, because it is about the JSON of the element and not about its value.
    """
    compiled: dict[tuple[str, str], dict[str, CompiledPath]] = defaultdict(dict)
    model = r4()
    for definition in read_lines(SHARED / "fhir-r4" / "structure-definitions.ndjson.gz"):
        resource = definition["type"] if definition["kind"] == "resource" else None
        for element in definition["snapshot"]["element"]:
            path = element["path"]
            types = {path} if path in model.types else {type_["code"] for type_ in element.get("type", ())}
            for type_ in types & model.types.keys():
                for constraint in element.get("constraint", ()):
                    key = constraint["key"]
                    if (type_, key) in NOT_APPLICABLE or (key == "ele-1" and model.is_primitive(type_)):
                        continue
                    compiled[path, type_][key] = compile_path(
                        constraint["expression"],
                        root_type=type_,
                        resource_type=resource,
                        hooks={"htmlChecks": lambda _: True},
                    )
    return compiled


def test_every_invariant_compiles_without_a_fallback() -> None:
    compiled = [path for paths in compile_constraints().values() for path in paths.values()]
    assert len(compiled) > 1000
    assert {path.expression for path in compiled if path.fallback} == set()
    assert all(callable(path.predicate) for path in {path.expression: path for path in compiled}.values())


@pytest.mark.parametrize("key", [("ChargeItemDefinition", "name.matches('x')"), ("decimal", "low.empty()")])
def test_an_invariant_that_refers_to_an_unknown_element_is_an_error(key: tuple[str, str]) -> None:
    with pytest.raises(FhirPathError, match="has no element"):
        compile_path(key[1], root_type=key[0])


def list_objects(
    item: dict[str, Any], type_: str, resource: dict[str, Any]
) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Yield a resource and every object in it, with its type and the resource that it belongs to."""
    yield item, type_, resource
    for name, value in item.items():
        known = r4().types[type_].json.get(name)
        for child in (value if isinstance(value, list) else [value]) if known else ():
            assert known is not None
            if isinstance(child, dict):
                inner = child if "resourceType" in child else resource
                yield from list_objects(child, child.get("resourceType", known[1]), inner)


def test_the_examples_of_the_specification_satisfy_every_invariant() -> None:
    violated = set()
    checked = 0
    for resource in read_lines(SHARED / "data" / "r4-examples" / "examples.ndjson.gz"):
        for item, type_, owner in list_objects(resource, resource["resourceType"], resource):
            for key, path in compile_constraints().get((type_, type_), {}).items():
                checked += 1
                if path.test(item, resource=owner, root=resource) is False:
                    violated.add(key)
    assert checked > 10_000
    # Some examples violate dom-6 and pdf-0, which are warnings.
    assert violated <= {"dom-6", "pdf-0"}
