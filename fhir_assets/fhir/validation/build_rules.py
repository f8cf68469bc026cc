"""Build ``r4.json.gz``, the validation rules of FHIR R4, from the published definitions.

::

    python -m fhir_assets.fhir.validation.build_rules FOLDER

FOLDER holds the StructureDefinitions, ValueSets and CodeSystems of R4 (4.0.1), as Bundles
(``profiles-resources.json``, ``profiles-types.json``, ``valuesets.json``, ``v2-tables.json``,
``v3-codesystems.json`` of https://hl7.org/fhir/R4/definitions.json.zip) or as NDJSON, gzipped or not. The result
contains only elements, cardinalities, types, codes and expressions. The same input always gives the same bytes.

``make rules`` runs this module and ``fhir_assets.fhir.build_model``.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fhir_assets.atomic_files import replace_content
from fhir_assets.fhir.validation.rules import RULES_FILE

Definition = dict[str, Any]

BASE = "http://hl7.org/fhir/StructureDefinition/"
FHIR_TYPE = BASE + "structuredefinition-fhir-type"
REPEATED_INVARIANTS = {"ele-1": "Element", "ext-1": "Extension"}
"""The invariants that the definitions repeat on every element. The rules contain them once, on the given type."""


def read_definitions(folder: Path) -> Iterator[Definition]:
    """Yield every resource in the Bundles and NDJSON files of a folder."""
    for file in sorted(folder.iterdir()):
        if not file.name.endswith((".json", ".json.gz", ".ndjson", ".ndjson.gz")):
            continue
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        documents = data.splitlines() if ".ndjson" in file.name else [data]
        for document in documents:
            resource: Definition = json.loads(document)
            if resource["resourceType"] == "Bundle":
                yield from (entry["resource"] for entry in resource.get("entry", ()))
            else:
                yield resource


def build(folder: Path) -> Definition:
    """Return the rules as one JSON object. Raises SystemExit if the folder has no StructureDefinitions of R4."""
    structures, value_sets, code_systems = [], {}, {}
    for resource in read_definitions(folder):
        match resource["resourceType"]:
            case "StructureDefinition" if resource["url"] == BASE + resource["type"]:
                structures.append(resource)
            case "ValueSet":
                value_sets[resource["url"]] = resource
            case "CodeSystem":
                code_systems[resource["url"]] = resource
    if not structures:
        raise SystemExit(f"no StructureDefinition in {folder}; pass the folder of the R4 definitions")
    rules: Definition = {}
    bound: set[str] = set()
    for definition in structures:
        if definition["kind"] in {"resource", "complex-type"}:
            rules.update(read_structure(definition, bound))
    return {
        "version": structures[0]["version"],
        "structures": dict(sorted(rules.items())),
        "valueSets": {url: expand(url, value_sets, code_systems) for url in sorted(bound)},
    }


def read_structure(definition: Definition, bound: set[str]) -> dict[str, Definition]:
    """Return the structure of a type and of each of its elements that has child elements, by path.

    Adds the value sets of required bindings to ``bound``.
    """
    elements = definition["snapshot"]["element"]
    parents = {element["path"].rpartition(".")[0] for element in elements} - {""}
    base = definition.get("baseDefinition", "").removeprefix(BASE)
    result: dict[str, Definition] = {}
    for element in elements:
        path: str = element["path"]
        constraints = [
            [c["key"], c["severity"], c["expression"]]
            for c in element.get("constraint", ())
            if REPEATED_INVARIANTS.get(c["key"], path) == path
        ]
        if path in parents:
            kind = definition["kind"] if path == definition["type"] else "backbone"
            result[path] = {"kind": kind, "elements": {}}
            if kind == "resource":
                result[path] |= {"base": base, "abstract": definition["abstract"]}
            if constraints:
                result[path]["invariants"] = constraints
        if "." not in path:
            continue
        parent, _, name = path.rpartition(".")
        result[parent]["elements"][name.removesuffix("[x]")] = read_element(
            element, [] if path in parents else constraints, path in parents, bound
        )
    return result


def read_element(element: Definition, constraints: list[list[str]], has_children: bool, bound: set[str]) -> Definition:
    """Return one element with short keys; a key is left out if it does not apply.

    ``t``: types; ``n``: required; ``l``: repeats (a list); ``c``: choice; ``v``: value set of a required binding;
    ``r``: target types of a reference; ``i``: invariants.
    """
    path: str = element["path"]
    rule: Definition = {}
    if "contentReference" in element:
        rule["t"] = [element["contentReference"].partition("#")[2]]
    elif has_children:
        rule["t"] = [path]
    else:
        rule["t"] = [type_name(element["base"]["path"], t) for t in element["type"]]
    if element["min"]:
        rule["n"] = 1
    if element["base"]["max"] != "1":
        rule["l"] = 1
    if path.endswith("[x]"):
        rule["c"] = 1
    binding = element.get("binding", {})
    if binding.get("strength") == "required":
        rule["v"] = binding["valueSet"].partition("|")[0]
        bound.add(rule["v"])
    targets = {
        profile.rpartition("/")[2]
        for t in element.get("type", ())
        if t["code"] == "Reference"
        for profile in t.get("targetProfile", ())
    }
    if targets - {"Resource"}:
        rule["r"] = sorted(targets)
    if constraints:
        rule["i"] = constraints
    return rule


def type_name(base_path: str, type_: Definition) -> str:
    """Return the FHIR type of an entry of ``ElementDefinition.type``.

    If its code is a FHIRPath System type, the FHIR type is in an extension, except for elements named ``id``.
    """
    code: str = type_["code"]
    if not code.startswith("http://hl7.org/fhirpath/"):
        return code
    if base_path in {"Resource.id", "Element.id"}:
        return "id" if base_path == "Resource.id" else base_path
    return next(str(e["valueUrl"]) for e in type_["extension"] if e["url"] == FHIR_TYPE)


def expand(url: str, value_sets: dict[str, Definition], systems: dict[str, Definition]) -> Definition | None:
    """Return the codes of a value set by code system; None if they cannot be enumerated (see ``bindings.GRAMMARS``).

    Raises SystemExit if the value set has a filter.
    """
    if url not in value_sets:
        return None
    codes: dict[str, set[str]] = {}
    for include in value_sets[url]["compose"]["include"]:
        for inner in include.get("valueSet", ()):
            for system, inner_codes in (expand(inner.partition("|")[0], value_sets, systems) or {}).items():
                codes.setdefault(system, set()).update(inner_codes)
        system = include.get("system")
        if system is None:
            continue
        if "filter" in include:
            raise SystemExit(f"{url} has a filter, which this script does not expand")
        if "concept" in include:
            codes.setdefault(system, set()).update(c["code"] for c in include["concept"])
        elif system in systems:
            codes.setdefault(system, set()).update(list_concept_codes(systems[system].get("concept", ())))
        else:
            return None
    return {system: sorted(codes[system]) for system in sorted(codes)}


def list_concept_codes(concepts: list[Definition]) -> Iterator[str]:
    """Yield the codes of the concepts of a CodeSystem, including child concepts."""
    for concept in concepts:
        yield concept["code"]
        yield from list_concept_codes(concept.get("concept", []))


def encode(rules: Definition) -> bytes:
    """Return the content of ``r4.json.gz``: compact JSON, compressed without a time stamp."""
    return gzip.compress(json.dumps(rules, separators=(",", ":"), sort_keys=False).encode(), 9, mtime=0)


def main() -> None:
    """Write ``r4.json.gz`` from the folder in the command line."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    replace_content(RULES_FILE, encode(build(Path(sys.argv[1]))))
    sys.stdout.write(f"{RULES_FILE.name}: {RULES_FILE.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
