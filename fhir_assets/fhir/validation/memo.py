"""Formats for the fast path: values seen before are not looked at again.

Clinical data repeats its systems, codes and references, and a set answers sooner than a regular expression. Only good
values are kept, at most ``LIMIT`` a kind; they are public vocabulary, dates and ids, never free text.
"""

import re
from collections.abc import Callable
from typing import Any

from fhir_assets.fhir.validation import primitives
from fhir_assets.fhir.validation.bindings import allows_coding
from fhir_assets.fhir.validation.narrative import check_xhtml
from fhir_assets.fhir.validation.references import literal_target
from fhir_assets.fhir.validation.rules import load_rules
from fhir_assets.fhir.validation.scope import FastScope

LIMIT = 20_000

KINDS = {
    "Element.id": "uri",
    "base64Binary": "base64",
    "canonical": "uri",
    "code": "code",
    "date": "date",
    "dateTime": "date_time",
    "id": "id",
    "instant": "instant",
    "oid": "oid",
    "time": "time",
    "uri": "uri",
    "url": "uri",
    "uuid": "uuid",
}
"""The kind of format that a primitive type has."""

SEEN: dict[str, set[str]] = {kind: set() for kind in ("uri", "code", "date")}

_USUAL_INSTANT = re.compile(
    r"(?!0000)[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
    r"(?:\.[0-9]+)?(?:Z|[+-](?:0[0-9]|1[0-3]):[0-5][0-9])"
).fullmatch
_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}").fullmatch


def _remember(seen: set[str], is_good: Callable[[str], bool]) -> Callable[[str], bool]:
    def new(value: str) -> bool:
        if not is_good(value):
            return False
        if len(seen) >= LIMIT:
            seen.clear()
        seen.add(value)
        return True

    return new


def _new_instant(value: str) -> bool:
    return _USUAL_INSTANT(value) is not None or primitives.is_instant(value)


def _new_date_time(value: str) -> bool:
    return _USUAL_INSTANT(value) is not None or primitives.is_date_time(value)


NEW: dict[str, Callable[[str], bool]] = {
    "base64": primitives.is_base64,
    "code": _remember(SEEN["code"], primitives.is_code),
    "date": _remember(SEEN["date"], primitives.is_date),
    "date_time": _new_date_time,
    "id": primitives.is_id,
    "instant": _new_instant,
    "oid": primitives.is_oid,
    "time": primitives.is_time,
    "uri": _remember(SEEN["uri"], primitives.is_uri),
    "uuid": primitives.is_uuid,
}


def xhtml_is_good(text: str) -> bool:
    return check_xhtml(text) is None


def concept_test(value_set: str) -> Callable[[Any], bool]:
    """Is a coding of the concept, a Struct, in the value set?"""
    pairs: set[tuple[str, str]] = set()

    def is_bound(concept: Any) -> bool:
        for coding in concept.coding or ():
            pair = (coding.system, coding.code)
            if pair in pairs:
                return True
            if allows_coding(value_set, {"system": coding.system, "code": coding.code}):
                pairs.add(pair)
                return True
        return False

    return is_bound


_TYPES = load_rules().resource_types


def target_of(reference: Any, scope: FastScope, targets: frozenset[str]) -> bool:
    """Does the reference, a Struct, surely point at one of the targets (none: any)?"""
    literal: str | None = reference.reference
    stated: str | None = reference.type
    if literal is None:
        return not targets or stated in targets or stated not in _TYPES
    found, slash, rest = literal.partition("/")
    if not (slash and found in _TYPES and _ID(rest)):
        if found.startswith("#"):
            local = scope.use(literal)
            if local is None:
                return False
            found = local
        else:
            target = literal_target(literal)
            if target is None:
                return False
            found = target
    if stated is not None and stated != found and stated in _TYPES:
        if found:
            return False
        found = stated
    return not targets or not found or found in targets
