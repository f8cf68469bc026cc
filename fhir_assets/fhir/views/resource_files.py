"""Resources from files, to try a view on: NDJSON, one resource in JSON, or a Bundle; each may be gzipped."""

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from fhir_assets.errors import NotFhir

_PATTERNS = ("*.ndjson", "*.ndjson.gz", "*.json", "*.json.gz")


def read_resources(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each resource with its place (``Patient.ndjson:17``), streamed; a Bundle, then its entries. A folder stands for
    the data files in it.

    Raises NotFhir with the file and line of what is no resource.
    """
    for path in paths:
        files = sorted(f for pattern in _PATTERNS for f in path.glob(pattern)) if path.is_dir() else [path]
        for file in files:
            yield from _read(file)


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        if ".ndjson" in path.name:
            yield from _lines(path)
        else:
            with _open(path) as file:
                yield from _whole(path, file.read())
    except (OSError, EOFError) as error:
        raise NotFhir(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield from _resources(f"{path.name}:{number}", line)


def _whole(path: Path, body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """One JSON document; NDJSON under another name is told by its second line."""
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        first, _, rest = body.strip().partition(b"\n")
        if rest and first.rstrip().endswith(b"}") and first.startswith(b"{"):
            yield from _lines(path)
            return
    yield from _resources(path.name, body)


def _resources(location: str, body: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise NotFhir(f"{location}: is not JSON: {error.msg}") from None
    if not isinstance(found, dict) or not isinstance(found.get("resourceType"), str):
        raise NotFhir(f"{location}: is not a resource: a JSON object with a resourceType is expected")
    yield location, found
    for n, entry in enumerate(found.get("entry", ()) if found["resourceType"] == "Bundle" else ()):
        if isinstance(entry, dict) and isinstance(entry.get("resource"), dict):
            yield f"{location} entry[{n}]", entry["resource"]
