"""Resources in files, for the preview of a view: NDJSON, a single resource or a container, each gzipped or not."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.containers import CONTAINERS, MAX_DEPTH
from fhir_assets.fhir.files.json_texts import JsonText, UnreadableText, find_files, read_json_texts

_ARRAYS = {"Bundle": "entry", "Parameters": "parameter"}


def read_resources(
    paths: Iterable[Path], on_error: Callable[[str, NotFhir], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each resource with its location (``Patient.ndjson:17``); a container is followed by its contents.

    For a folder, its NDJSON and JSON files are read. What is not a resource is skipped: ``on_error`` is called with
    its location and the reason, without content of the file; without ``on_error``, the NotFhir is raised. Raises
    NotFhir if a file does not exist or cannot be opened, before anything is read.
    """

    def report(location: str, problem: str) -> None:
        if on_error is None:
            raise NotFhir(f"{location}: {problem}")
        on_error(location, NotFhir(problem))

    for file in find_files(paths):
        for text in read_json_texts(file):
            location = f"{file.name}:{text.line}"
            if isinstance(text, UnreadableText):
                report(location, f"cannot be read: {text.message}")
            else:
                yield from _read_text(location, text, report)


def _read_text(
    location: str, text: JsonText, report: Callable[[str, str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        resource = orjson.loads(text.body)
    except orjson.JSONDecodeError as error:
        report(location, f"is not JSON: {error.msg}")
        return
    yield from _unpack(location, resource, report, 0)


def _unpack(
    location: str, resource: Any, report: Callable[[str, str], None], depth: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a resource and, if it is a container, the resources in it, at any depth."""
    name = resource.get("resourceType") if isinstance(resource, dict) else None
    if not isinstance(name, str):
        report(location, "is not a resource: a JSON object with a resourceType is expected")
        return
    yield location, resource
    if name not in CONTAINERS:
        return
    yield from _unpack_entries(location, resource.get(_ARRAYS[name]), _ARRAYS[name], report, depth)


def _unpack_entries(
    location: str, entries: Any, array: str, report: Callable[[str, str], None], depth: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    if entries is None:
        return
    if depth == MAX_DEPTH:
        report(location, f"containers are nested more than {MAX_DEPTH} levels deep")
        return
    if not isinstance(entries, list):
        report(f"{location} {array}", "is not an array")
        return
    for n, entry in enumerate(entries):
        place = f"{location} {array}[{n}]"
        if not isinstance(entry, dict):
            report(place, "is not an object")
            continue
        if entry.get("resource") is not None:
            yield from _unpack(place, entry["resource"], report, depth + 1)
        if "part" in entry:
            yield from _unpack_entries(place, entry["part"], "part", report, depth + 1)
