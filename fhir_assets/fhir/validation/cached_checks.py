"""Tests for the fast path that remember: what was found good is not looked at again.

Clinical data repeats its systems, codes and references, and a set answers sooner than a regular expression. Only good
values are kept, at most ``LIMIT`` a set; they are public vocabulary and ids, never free text.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from fhir_assets.fhir.validation import primitives
from fhir_assets.fhir.validation.bindings import allows_coding
from fhir_assets.fhir.validation.contained import ContainedScope
from fhir_assets.fhir.validation.decoder_patterns import literal_reference
from fhir_assets.fhir.validation.narrative import check_xhtml
from fhir_assets.fhir.validation.references import resolve_target_type
from fhir_assets.fhir.validation.rules import load_rules

LIMIT = 20_000

KINDS = {
    "base64Binary": "base64",
    "canonical": "uri",
    "code": "code",
    "date": "date",
    "id": "id",
    "uri": "uri",
    "url": "uri",
}
"""The remembering test of a primitive type."""

SEEN: dict[str, set[str]] = {"uri": set(), "code": set(), "date": set(), "id": set()}


def remember(seen: set[Any], value: Any) -> None:
    """Keeps a good value; starts again when there are too many."""
    if len(seen) >= LIMIT:
        seen.clear()
    seen.add(value)


def _remembering(seen: set[str], is_good: Callable[[str], bool]) -> Callable[[str], bool]:
    def new(value: str) -> bool:
        good = is_good(value)
        if good:
            remember(seen, value)
        return good

    return new


NEW: dict[str, Callable[[str], bool]] = {
    "base64": primitives.is_base64,
    "code": _remembering(SEEN["code"], primitives.is_code),
    "date": _remembering(SEEN["date"], primitives.is_date),
    "id": _remembering(SEEN["id"], primitives.is_id),
    "uri": _remembering(SEEN["uri"], primitives.is_uri),
}


def xhtml_is_good(text: str) -> bool:
    """Is the narrative without any finding?"""
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
                remember(pairs, pair)
                return True
        return False

    return is_bound


_TYPES = load_rules().resource_types


class Targets:
    """The types that a Reference may point at (none: any), and the references known to do so."""

    def __init__(self, types: frozenset[str]) -> None:
        self.types = types
        self.seen: set[str] = set()
        self._is_literal = literal_reference(types or _TYPES).fullmatch

    def allow(self, reference: Any, scope: ContainedScope) -> bool:
        """Does the reference, a Struct, surely point at one of the types?"""
        literal: str | None = reference.reference
        stated: str | None = reference.type
        if literal is None:
            return not self.types or stated in self.types or stated not in _TYPES
        if stated is None and self._is_literal(literal):
            remember(self.seen, literal)
            return True
        found = scope.use(literal) if literal.startswith("#") else resolve_target_type(literal)
        if found is None:
            return False
        if stated is not None and stated != found and stated in _TYPES:
            if found:
                return False
            found = stated
        return not self.types or not found or found in self.types


@cache
def targets(types: frozenset[str]) -> Targets:
    """One Targets for all elements with the same types."""
    return Targets(types)
