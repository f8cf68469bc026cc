"""Extensions of views: a definition with ``extends`` adds columns to another view, under its name or a new one.

``{"extends": "patient", "select": [{"column": […]}]}`` is the view ``patient`` with further columns. The member is not
part of SQL on FHIR; the extended definition is, and nothing behind this module sees the difference.
"""

import re
from collections.abc import Mapping
from typing import Any

from fhir_assets.errors import ViewError
from fhir_assets.fhir.model import suggest_name
from fhir_assets.fhir.views.definition import View

EXTENDS = "extends"

_ADDED = ("constant", "select", "where")
"""The members whose elements are added to those of the extended view."""

_OWN = ("name", "title", "description", "version", "url", "status")
"""The members that replace those of the extended view."""

_KNOWN = {EXTENDS, "resourceType", "resource", "fhirVersion", "meta", "id", *_ADDED, *_OWN}
_LOCATION = re.compile(r"\b(constant|select|where)\[(\d+)\]")


def extend(definition: Mapping[str, Any], views: Mapping[str, View], place: str) -> tuple[dict[str, Any], View]:
    """Return the definition of an extended view, and the view that it extends, one of ``views``.

    Raises ViewError, which begins with ``place``, if there is no such view, or if a member cannot extend it.
    """
    name = definition[EXTENDS]
    base = views.get(name) if isinstance(name, str) else None
    if base is None:
        raise ViewError(f"{place}: {EXTENDS}: there is no view {name!r}{suggest_name(str(name), list(views))}")
    if definition.get("resource", base.resource_type) != base.resource_type:
        raise ViewError(f"{place}: resource: the view {base.name} is of {base.resource_type}: leave the member out")
    if unknown := [member for member in definition if member not in _KNOWN]:
        raise ViewError(f"{place}: {unknown[0]}: cannot be part of a view that extends another")
    for member in _ADDED:
        if not isinstance(definition.get(member, []), list):
            raise ViewError(f"{place}: {member}: is not an array")
    extended = {key: value for key, value in base.definition.items() if key not in ("id", "meta")}
    extended |= {"name": base.name, **{key: definition[key] for key in _OWN if key in definition}}
    extended |= {
        member: [*base.definition.get(member, []), *definition.get(member, [])]
        for member in _ADDED
        if member in base.definition or member in definition
    }
    return extended, base


def restore_locations(message: str, base: View) -> str:
    """Return a message about an extended definition with the locations in the definition that extends ``base``."""

    def restore(match: re.Match[str]) -> str:
        inherited = len(base.definition.get(match[1], []))
        number = int(match[2]) - inherited
        return f"{match[1]}[{number}]" if number >= 0 else f"{match[1]}[{match[2]}] of {base.name}"

    return _LOCATION.sub(restore, message, count=1)
