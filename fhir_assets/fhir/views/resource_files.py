"""Resources in files, for the preview of a view: NDJSON, a single resource or a Bundle, each gzipped or not."""

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from fhir_assets.errors import NotFhir

_PATTERNS = ("*.ndjson", "*.ndjson.gz", "*.json", "*.json.gz")


def read_resources(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each resource with its location (``Patient.ndjson:17``); a Bundle is followed by its entries.

    For a folder, its NDJSON and JSON files are read. Raises NotFhir if a file cannot be read, or, with file and line,
    if a JSON text is not a resource.
    """
    for path in paths:
        files = sorted(f for pattern in _PATTERNS for f in path.glob(pattern)) if path.is_dir() else [path]
        for file in files:
            yield from _read_file(file)


def _read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        if ".ndjson" in path.name:
            yield from _read_lines(path)
        else:
            with _open(path) as file:
                yield from _read_document(path, file.read())
    except (OSError, EOFError) as error:
        raise NotFhir(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield from _parse_resources(f"{path.name}:{number}", line)


def _read_document(path: Path, body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the resources of a JSON document, or of NDJSON in a file without ``.ndjson`` in its name."""
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        first, _, rest = body.strip().partition(b"\n")
        if rest and first.rstrip().endswith(b"}") and first.startswith(b"{"):
            yield from _read_lines(path)
            return
    yield from _parse_resources(path.name, body)


def _parse_resources(location: str, body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        resource = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise NotFhir(f"{location}: is not JSON: {error.msg}") from None
    if not isinstance(resource, dict) or not isinstance(resource.get("resourceType"), str):
        raise NotFhir(f"{location}: is not a resource: a JSON object with a resourceType is expected")
    yield location, resource
    for n, entry in enumerate(resource.get("entry", ()) if resource["resourceType"] == "Bundle" else ()):
        if isinstance(entry, dict) and isinstance(entry.get("resource"), dict):
            yield f"{location} entry[{n}]", entry["resource"]
