"""Load ViewDefinitions from files and folders. An invalid file does not prevent the other files from loading."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from fhir_assets.errors import ViewError
from fhir_assets.fhir.references import Bases
from fhir_assets.fhir.views.definition import View, parse_view


@dataclass(frozen=True, slots=True)
class BrokenView:
    """A file that does not contain a valid ViewDefinition, and the reason."""

    path: Path
    message: str


@dataclass(frozen=True, slots=True)
class ViewSet:
    """The views of one or more folders, sorted by name, and the invalid files."""

    views: tuple[View, ...]
    broken: tuple[BrokenView, ...]


def read_definition(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises ViewError if the file cannot be read or does not contain a JSON object."""
    return _decode(path, _read(path))


def read_view(path: Path, reference_bases: Bases = None) -> View:
    """Read and parse the ViewDefinition in a file. Raises ViewError if the file cannot be read or is invalid."""
    return replace(_parse(path, _read(path)), reference_bases=reference_bases)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ViewError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(path: Path, content: bytes) -> dict[str, Any]:
    try:
        definition = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ViewError(f"{path}: is not JSON: {error}") from None
    if not isinstance(definition, dict):
        raise ViewError(f"{path}: a ViewDefinition must be a JSON object")
    return definition


@lru_cache(maxsize=1024)
def _parse(path: Path, content: bytes) -> View:
    """Parse the content of a file. The result is cached, because commands read all views several times."""
    return parse_view(_decode(path, content), path)


def load_views(folders: Sequence[Path], reference_bases: Bases = None) -> ViewSet:
    """Load every ``*.json`` file of the folders. A view whose name another view already has is reported as broken.

    Absolute references have keys only if they begin with one of ``reference_bases``; None: any.
    """
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    views: dict[str, View] = {}
    broken: list[BrokenView] = []
    for path in paths:
        try:
            view = read_view(path, reference_bases)
        except ViewError as error:
            broken.append(BrokenView(path, str(error)))
            continue
        if view.name in views:
            other = views[view.name].path
            broken.append(BrokenView(path, f'{path}: name: "{view.name}" is already the name of the view in {other}'))
        else:
            views[view.name] = view
    return ViewSet(tuple(sorted(views.values(), key=lambda view: view.name)), tuple(broken))
