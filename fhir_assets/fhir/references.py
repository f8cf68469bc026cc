"""Literal references, and which of them refer to a resource of the deployment's own sources.

See https://hl7.org/fhir/R4/references.html#literal. A relative reference (``Patient/1``) refers to the server of its
resource. An absolute one has a key only if its base belongs to one of the own sources, because ``Patient/1`` of another
server is another person. Versions (``/_history/2``) are left out of keys.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

Bases = frozenset[str] | None
"""The base URLs of the deployment's own sources, as ``normalize_bases`` returns them. None: any base."""

ABSOLUTE = "absolute"
URN = "urn"
CONDITIONAL = "conditional"
IDENTIFIER = "identifier"
OTHER = "other"

_TYPE = re.compile(r"[A-Z][A-Za-z]+")
_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}")
_find_unusual = re.compile(
    rb'"reference"\s*:\s*("(?!#)(?![A-Z][A-Za-z]+/[A-Za-z0-9\-.]{1,64}(?:/_history/[A-Za-z0-9\-.]+)?")(?:[^"\\]|\\.)*")'
).findall
_has_logical = re.compile(rb'"identifier"\s*:\s*\{').search
_parse_text = msgspec.json.Decoder(str).decode


def normalize_bases(urls: Collection[str]) -> frozenset[str]:
    """Return the base URLs among ``urls``, with both schemes: servers behind a proxy write http for https."""
    found = (url.strip().rstrip("/").partition("://") for url in urls)
    return frozenset(
        f"{scheme}://{rest}"
        for given, _, rest in found
        if given.lower() in ("http", "https") and rest
        for scheme in ("http", "https")
    )


def split_reference(literal: str, bases: Bases) -> tuple[str, str] | None:
    """Return the type and id in a literal reference to a resource of an own source; None for any other reference."""
    if "?" in literal:
        return None
    path = literal.split("/_history/", 1)[0]
    parts = path.rsplit("/", 2)
    if len(parts) == 3:
        base, resource_type, resource_id = parts
        if not base.startswith(("http://", "https://")) or (bases is not None and base not in bases):
            return None
    elif len(parts) == 2:
        resource_type, resource_id = parts
    else:
        return None
    if not resource_id or not resource_type[:1].isupper():
        return None
    return resource_type, resource_id


def find_keyless(resource: Mapping[str, Any], body: bytes, bases: Bases) -> tuple[str, ...]:
    """Return descriptions of the references of a resource that have no key, without duplicates.

    A description is ``form`` or ``form Type``. ``body`` is the JSON of the resource. References to contained resources
    are left out. The forms are ``absolute`` (of another server), ``urn``, ``conditional`` (``Patient?identifier=…``),
    ``identifier`` (a logical reference) and ``other``.
    """
    found = dict.fromkeys(_describe(literal, bases) for literal in _find_unusual(body))
    if _has_logical(body):
        found.update(dict.fromkeys(_find_logical(resource)))
    found.pop(None, None)
    return tuple(sorted(form for form in found if form))


def _describe(encoded: bytes, bases: Bases) -> str | None:
    """Return the form and the type of a reference that has no key; None if it has one."""
    literal = _parse_text(encoded)
    if literal.startswith("#") or split_reference(literal, bases):
        return None
    if literal.startswith("urn:"):
        return URN
    path, question, _ = literal.partition("?")
    if question:
        resource_type = path.rsplit("/", 1)[-1]
        return f"{CONDITIONAL} {resource_type}" if _TYPE.fullmatch(resource_type) else OTHER
    parts = path.split("/_history/", 1)[0].rsplit("/", 2)
    if len(parts) == 3 and "://" in parts[0] and _TYPE.fullmatch(parts[1]) and _ID.fullmatch(parts[2]):
        return f"{ABSOLUTE} {parts[1]}"
    return OTHER


def _find_logical(node: Any) -> Iterator[str]:
    """Yield the forms of the logical references of an element and its descendants."""
    if isinstance(node, list):
        for item in node:
            yield from _find_logical(item)
    elif isinstance(node, dict):
        if isinstance(node.get("identifier"), dict) and "reference" not in node and "resourceType" not in node:
            name = node.get("type")
            yield f"{IDENTIFIER} {name}" if isinstance(name, str) and _TYPE.fullmatch(name) else IDENTIFIER
        for value in node.values():
            if isinstance(value, dict | list):
                yield from _find_logical(value)
