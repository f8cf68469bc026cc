"""Load ViewDefinitions from files and folders. An invalid file does not prevent the other files from loading."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from fhir_assets.control_characters import escape_control_characters
from fhir_assets.errors import ViewError
from fhir_assets.fhir.references import Bases
from fhir_assets.fhir.views.definition import Problem, View, check_view, parse_view
from fhir_assets.fhir.views.extension import EXTENDS, extend, restore_locations
from fhir_assets.local_files import open_regular

_MAX_BYTES = 16 << 20
"""The size of a file, beyond which it is no ViewDefinition."""

_NO_VIEWS: Mapping[str, View] = {}


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


def read_view(path: Path, reference_bases: Bases = None, *, views: Mapping[str, View] = _NO_VIEWS) -> View:
    """Read and parse the ViewDefinition in a file.

    ``views`` are the views, by name, that it may extend. Raises ViewError if the file cannot be read or is invalid.
    """
    return _complete(path, _parse(path, _read(path)), reference_bases, views)


def _complete(path: Path, parsed: View | dict[str, Any], reference_bases: Bases, views: Mapping[str, View]) -> View:
    """Return the view of a file. ``parsed`` is the result of ``_parse``."""
    if isinstance(parsed, View):
        return replace(parsed, reference_bases=reference_bases)
    definition, base = extend(parsed, views, str(path))
    try:
        return parse_view(definition, path, reference_bases)
    except ViewError as error:
        raise ViewError(restore_locations(str(error), base)) from None


def find_problems(path: Path, views: Mapping[str, View]) -> list[Problem]:
    """Return all problems of the ViewDefinition in a file, which may extend one of ``views``.

    Raises ViewError if the file cannot be read, or if it extends no view.
    """
    definition = read_definition(path)
    if EXTENDS not in definition:
        return check_view(definition)
    extended, base = extend(definition, views, str(path))
    return [replace(problem, location=restore_locations(problem.location, base)) for problem in check_view(extended)]


def _read(path: Path) -> bytes:
    try:
        with open_regular(str(path), follow=True) as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ViewError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _MAX_BYTES:
        raise ViewError(f"{path}: is larger than {_MAX_BYTES:,} bytes, as no ViewDefinition is")
    return content


def _require_inside(path: Path, folder: Path) -> None:
    """Raise ViewError if a file is a link out of its folder. Kubernetes mounts files as links within theirs."""
    if path.is_symlink() and not os.path.realpath(path).startswith(f"{os.path.realpath(folder)}/"):
        raise ViewError(f"{path}: is a link out of its folder, which is not followed: put the file itself there")


def _decode(path: Path, content: bytes) -> dict[str, Any]:
    try:
        definition = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ViewError(f"{path}: is not JSON: {error}") from None
    if not isinstance(definition, dict):
        raise ViewError(f"{path}: a ViewDefinition must be a JSON object")
    return definition


@lru_cache(maxsize=1024)
def _parse(path: Path, content: bytes) -> View | dict[str, Any]:
    """Parse the content of a file, unless it extends another view: then its JSON is returned.

    The result is cached, because commands read all views several times.
    """
    definition = _decode(path, content)
    return definition if EXTENDS in definition else parse_view(definition, path)


FileVersion = tuple[str, tuple[int, int, int] | None]
"""The path of a file, and its inode, modification time in nanoseconds and size; None if it cannot be read."""


def list_versions(folders: Sequence[Path]) -> tuple[FileVersion, ...]:
    """Return the versions of the files that ``load_views`` reads. They differ if a file was changed or replaced."""
    return tuple((str(path), _get_version(path)) for folder in folders for path in sorted(folder.glob("*.json")))


def _get_version(path: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def load_views(
    folders: Sequence[Path],
    reference_bases: Bases = None,
    *,
    leave_out: Collection[Path] = (),
    trusted: Collection[Path] = (),
    validate: Callable[[View], object] = lambda _: None,
) -> ViewSet:
    """Load every ``*.json`` file of the folders but those of ``leave_out``.

    Links out of a folder are not followed, unless it is one of ``trusted``.

    A view whose name another view already has is reported as broken, unless it extends that view; so is one for which
    ``validate`` raises ViewError, and the view that it extends stays as it was. Views that extend others are read after
    the others, in the order of the files. Absolute references have keys only if they begin with one of
    ``reference_bases``; None: any.
    """
    excluded = set(map(os.path.realpath, leave_out))
    paths = {
        path: folder
        for folder in folders
        for path in sorted(folder.glob("*.json"))
        if not (excluded and os.path.realpath(path) in excluded)
    }
    parsed: list[tuple[Path, View | dict[str, Any]]] = []
    broken: dict[Path, str] = {}
    for path, folder in paths.items():
        try:
            if folder not in trusted:
                _require_inside(path, folder)
            parsed.append((path, _parse(path, _read(path))))
        except ViewError as error:
            broken[path] = str(error)
    views: dict[str, View] = {}
    for path, content in sorted(parsed, key=lambda item: not isinstance(item[1], View)):
        try:
            view = _complete(path, content, reference_bases, views)
        except ViewError as error:
            broken[path] = str(error)
            continue
        if view.name in views and (isinstance(content, View) or content[EXTENDS] != view.name):
            other = views[view.name].path
            broken[path] = f'{path}: name: "{view.name}" is already the name of the view in {other}'
            continue
        try:
            validate(view)
        except ViewError as error:
            broken[path] = f"{path}: {error}"
        else:
            views[view.name] = view
    return ViewSet(
        tuple(sorted(views.values(), key=lambda view: view.name)),
        tuple(BrokenView(path, escape_control_characters(broken[path])) for path in paths if path in broken),
    )
