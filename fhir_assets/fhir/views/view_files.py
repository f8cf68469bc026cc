"""ViewDefinitions from folders. A broken one never stops the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from fhir_assets.errors import ViewError
from fhir_assets.fhir.views.definition import View, parse_view


@dataclass(frozen=True, slots=True)
class BrokenView:
    """A file that is no valid ViewDefinition, and why."""

    path: Path
    message: str


@dataclass(frozen=True, slots=True)
class ViewSet:
    """What folders hold."""

    views: tuple[View, ...]
    broken: tuple[BrokenView, ...]


def read_definition(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ViewError."""
    try:
        definition = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ViewError(f"{path}: cannot be read: {error.strerror}") from None
    except orjson.JSONDecodeError as error:
        raise ViewError(f"{path}: is not JSON: {error}") from None
    if not isinstance(definition, dict):
        raise ViewError(f"{path}: is not a JSON object: a ViewDefinition is one")
    return definition


def read_view(path: Path) -> View:
    """The ViewDefinition of a file. Raises ViewError."""
    return parse_view(read_definition(path), path)


def load_views(folders: Sequence[Path]) -> ViewSet:
    """Every ``*.json`` of the folders, by name. Of two views with one name the first holds, the other is broken."""
    views: dict[str, View] = {}
    broken: list[BrokenView] = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        try:
            view = read_view(path)
        except ViewError as error:
            broken.append(BrokenView(path, str(error)))
            continue
        if view.name in views:
            other = views[view.name].path
            broken.append(BrokenView(path, f'{path}: name: "{view.name}" is already the name of {other}'))
        else:
            views[view.name] = view
    return ViewSet(tuple(sorted(views.values(), key=lambda view: view.name)), tuple(broken))
