"""The leaf values of resources that no table has: those that can change without a change of any row.

``python -m fhir_assets_tests.support.lost_leaves DATA`` writes ``lost_leaves.json`` again for the folders
``DATA/synthea`` and ``DATA/r4-examples``. A new path gets the first of REASONS whose pattern matches it.
"""

import gzip
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import orjson

from fhir_assets_tests.support.saturated_resources import Resource
from fhir_assets_tests.support.shipped_views import compile_views_of_type, views_of_type

LIST = Path(__file__).resolve().parents[1] / "fhir" / "lost_leaves.json"
SETS = ("synthea", "r4-examples")
"""The folders of the examples."""

REASONS = {
    "narrative": ("text.*|*:text.*", "Narrative for people, generated from the elements that the tables have."),
    "contained": (
        "*contained.*",
        "Contained resources other than Medication, Coverage, Practitioner and Organization, and elements of these "
        "for which the parent has no column.",
    ),
    "extension": ("*extension.*", "Extensions of profiles: a ViewDefinition with `extends` adds them."),
    "meta": ("*:meta.*|*:language|*:implicitRules", "Facts about the record at its server: profiles, tags, language."),
    "name of a reference": (
        "*:subject.display|*:patient.display|*:*encounter.display|*:beneficiary.display",
        "The name of a person or an encounter: the key leads to its table.",
    ),
    "name of a target": (
        "*er.display|*or.display|*ee.display|*tion.display|*result.display|*erence.display|*.who.display|*.actor.display|"
        "*.member.display|*.individual.display|*.party.display|*device.display|*specimen.display|*location.display",
        "The name that the source gives the target of a reference: the key leads to its table.",
    ),
    "name of a code": ("*.display", "The name of a code or of a target that a column has."),
    "system": (
        "*.system|*.coding.version|*userSelected",
        "The system of a code that R4 binds or whose column names the system; its version.",
    ),
    "type of an identifier": (
        "*identifier.type.*|*dentifier.use|*dentifier.period.*|*dentifier.assigner.*",
        "Kind, use and period of an identifier whose value a table has, or of a logical reference.",
    ),
    "identifier": (
        "*dentifier.value|*:groupIdentifier.*",
        "Business identifiers of types without a table of identifiers, and logical references.",
    ),
    "reference": (
        "*.reference|*instantiates*",
        "References to contained resources, to other servers and to types without a table.",
    ),
    "use": ("*.use|*.rank|*.type", "Use, rank and literal types of contacts, addresses and references."),
    "history": ("*History.*", "Earlier states, which the earlier versions of the resource have."),
    "binary": ("*photo.*|*signature.*|*.data|*.hash|*.size", "Images, signatures and attachments' bytes."),
    "third level": (
        "*.subDetail.*|*.detail.adjudication.*",
        "The third level of items, which no claim of Synthea has.",
    ),
    "dosage": (
        "*osage*.*|*.scheduledTiming.*|*occurrenceTiming.*",
        "Details of a dosage or timing beyond text, dose, rate, route and frequency.",
    ),
    "further code": (
        "*.coding.code",
        "Further codings of concepts that have no table of codings, and codes of concepts without a column.",
    ),
    "unit": ("*.code|*.unit", "Codes and units of quantities and ranges whose other unit or text a column has."),
    "rare": ("*", "Rare elements that no target model names: a ViewDefinition with `extends` adds them."),
}
"""The reasons by key: patterns of ``Type:path``, separated by |, and the sentence."""

_SAMPLES = 3
"""The resources in which each path is changed, at the last of its positions."""

_YEAR = re.compile(r"^(1|2)\d{3}")
_Position = tuple[str | int, ...]


def read_resources(folders: Iterable[Path]) -> Iterator[Resource]:
    """Yield the resources with views of all ``*.ndjson.gz`` files of the folders."""
    for folder in folders:
        for file in sorted(folder.glob("*.ndjson.gz")):
            for line in gzip.decompress(file.read_bytes()).splitlines():
                resource = orjson.loads(line)
                if views_of_type(resource["resourceType"]):
                    yield resource


def list_leaves(node: Any, position: _Position = ()) -> Iterator[_Position]:
    """Yield the positions of all primitive values of a resource but its type and id."""
    if isinstance(node, dict):
        for name, value in node.items():
            if position or name not in ("resourceType", "id"):
                yield from list_leaves(value, (*position, name))
    elif isinstance(node, list):
        for n, value in enumerate(node):
            yield from list_leaves(value, (*position, n))
    elif node is not None:
        yield position


def find_lost_leaves(resources: Iterable[Resource]) -> dict[str, tuple[float, dict[str, int]]]:
    """Return by type the share of leaf values that no table has, and their paths with the number of values.

    A path counts as lost if the change of its last value changes no row in one of the sampled resources.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    samples: dict[tuple[str, str], list[tuple[Resource, _Position]]] = defaultdict(list)
    for resource in resources:
        resource_type = resource["resourceType"]
        last: dict[str, _Position] = {}
        for position in list_leaves(resource):
            path = ".".join(part for part in position if isinstance(part, str))
            counts[resource_type][path] += 1
            last[path] = position
        for path, position in last.items():
            kept = samples[resource_type, path]
            if len(kept) < _SAMPLES:
                kept.append((resource, position))
    lost: dict[str, dict[str, int]] = {name: {} for name in counts}
    for (resource_type, path), kept in samples.items():
        if not all(_changes_rows(resource, position) for resource, position in kept):
            lost[resource_type][path] = counts[resource_type][path]
    return {
        name: (sum(lost[name].values()) / counts[name].total(), dict(sorted(lost[name].items())))
        for name in sorted(counts)
    }


def _changes_rows(resource: Resource, position: _Position) -> bool:
    views = compile_views_of_type(resource["resourceType"])
    before = views.rows(resource)
    changed = orjson.loads(orjson.dumps(resource))
    node = changed
    for part in position[:-1]:
        node = node[part]
    node[position[-1]] = _change(node[position[-1]])
    return bool(views.rows(changed) != before)


def _change(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case _:
            year = "1998" if value.startswith("1999") else "1999"
            return _YEAR.sub(year, value) if _YEAR.match(value) else f"{value}x"


def choose_reason(resource_type: str, path: str) -> str:
    """Return the key of the first reason whose pattern matches a path."""
    name = f"{resource_type}:{path}"
    return next(
        key for key, (patterns, _) in REASONS.items() if any(fnmatchcase(name, each) for each in patterns.split("|"))
    )


def build_list(data: Path) -> dict[str, Any]:
    """Return the content of the list for the examples below ``data``."""
    types: dict[str, dict[str, Any]] = {}
    for name in SETS:
        for resource_type, (share, paths) in find_lost_leaves(read_resources([data / name])).items():
            entry = types.setdefault(resource_type, {"share": {}, "paths": {}})
            entry["share"][name] = round(share, 3)
            for path in paths:
                entry["paths"].setdefault(path, {"in": [], "reason": choose_reason(resource_type, path)})["in"].append(
                    name
                )
    for entry in types.values():
        entry["paths"] = dict(sorted(entry["paths"].items()))
    return {"reasons": {key: text for key, (_, text) in REASONS.items()}, "types": dict(sorted(types.items()))}


def main(data: str) -> None:
    """Write the list for the examples below ``data``."""
    content = orjson.dumps(build_list(Path(data)))
    # One line for each path, so that a change of the list is readable.
    text = (
        content.decode().replace('"},"', '"},\n"').replace('{"share"', '\n{"share"').replace('"paths":{', '"paths":{\n')
    )
    LIST.write_text(f"{text}\n")


if __name__ == "__main__":
    main(sys.argv[1])
