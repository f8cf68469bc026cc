"""Compiler of R4 StructureDefinitions into the type model: ``python -m fhir_assets.fhir.build_model FOLDER``.

FOLDER holds ``structure-definitions.ndjson.gz`` (the base definitions, with snapshots). The result is
``model.json.gz`` in the folder of this module: the kind, the base and the elements of each type.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fhir_assets.atomic_files import replace_content

MODEL_FILE = Path(__file__).with_name("model.json.gz")

_EXTENSIONS = "http://hl7.org/fhir/StructureDefinition/"
_FHIR_TYPE = f"{_EXTENSIONS}structuredefinition-fhir-type"
_REGEX = f"{_EXTENSIONS}regex"


def _last_segment(url: str) -> str:
    return url.rpartition("/")[2]


def _extension(type_: dict[str, Any], url: str) -> str | None:
    for extension in type_.get("extension", ()):
        if extension["url"] == url:
            return str(next(value for key, value in extension.items() if key.startswith("value")))
    return None


def _type_names(element: dict[str, Any], parents: set[str], kind: str) -> list[str]:
    path: str = element["path"]
    if "contentReference" in element:
        return [element["contentReference"].removeprefix("#")]
    if path in parents:
        return [path]
    if kind == "resource" and path.count(".") == 1 and path.endswith(".id"):
        return ["id"]
    return [
        _extension(type_, _FHIR_TYPE) or "string" if type_["code"].startswith("http") else type_["code"]
        for type_ in element["type"]
    ]


def _compile(definition: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the model of the type and of its nested types, which are named by their paths."""
    elements = definition["snapshot"]["element"]
    kind = definition["kind"].removesuffix("-type")
    parents = {element["path"].rpartition(".")[0] for element in elements}
    types: dict[str, dict[str, Any]] = {
        definition["type"]: {
            "kind": kind,
            "base": _last_segment(definition.get("baseDefinition", "")) or None,
            "abstract": definition["abstract"],
            "elements": [],
        }
    }
    for element in elements[1:]:
        parent, _, name = element["path"].rpartition(".")
        if element["path"] in parents:
            base = element["type"][0]["code"]
            types[element["path"]] = {"kind": "nested", "base": base, "abstract": False, "elements": []}
        if kind == "primitive" and name == "value":
            types[parent]["regex"] = next(
                (regex for type_ in element["type"] if (regex := _extension(type_, _REGEX))), None
            )
            continue
        targets = sorted(
            {_last_segment(url) for type_ in element.get("type", ()) for url in type_.get("targetProfile", ())}
        )
        types[parent]["elements"].append(
            [name, _type_names(element, parents, kind), element["min"], element["max"], *([targets] if targets else [])]
        )
    yield from types.items()


def build(folder: Path) -> dict[str, Any]:
    """Return the model as plain JSON, compiled from the definitions in ``folder``."""
    types: dict[str, dict[str, Any]] = {}
    with gzip.open(folder / "structure-definitions.ndjson.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            types.update(_compile(json.loads(line)))
    return {"fhirVersion": "4.0.1", "types": dict(sorted(types.items()))}


def encode(model: dict[str, Any]) -> bytes:
    """Return the content of ``model.json.gz``: compact JSON, compressed without a time stamp."""
    text = json.dumps(model, separators=(",", ":"), sort_keys=True)
    return gzip.compress(text.encode(), mtime=0)


def main() -> None:
    """Write ``model.json.gz``."""
    replace_content(MODEL_FILE, encode(build(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
