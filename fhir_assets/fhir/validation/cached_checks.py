"""Checks of the fast path with a cache of valid values.

Clinical data repeats systems, codes and references, and a set lookup is faster than a regular expression. The caches
hold valid values only, at most ``LIMIT`` each: codes, URIs, dates, ids and references, never free text.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from fhir_assets.fhir.validation import primitives
from fhir_assets.fhir.validation.bindings import allows_coding
from fhir_assets.fhir.validation.contained import ContainedScope
from fhir_assets.fhir.validation.decoder_patterns import compile_literal_reference
from fhir_assets.fhir.validation.narrative import check_xhtml
from fhir_assets.fhir.validation.references import resolve_target_type
from fhir_assets.fhir.validation.rules import load_rules

LIMIT = 20_000
"""The maximum number of values in a cache."""

KINDS = {
    "base64Binary": "base64",
    "canonical": "uri",
    "code": "code",
    "date": "date",
    "id": "id",
    "uri": "uri",
    "url": "uri",
}
"""The key of the check in ``NEW`` and of the cache in ``SEEN`` for each primitive type."""

SEEN: dict[str, set[str]] = {"uri": set(), "code": set(), "date": set(), "id": set()}
"""The caches of valid values."""


def remember(seen: set[Any], value: Any) -> None:
    """Add a valid value to a cache, which is emptied first if it is full."""
    if len(seen) >= LIMIT:
        seen.clear()
    seen.add(value)


def _add_cache(seen: set[str], is_valid: Callable[[str], bool]) -> Callable[[str], bool]:
    def check_new(value: str) -> bool:
        valid = is_valid(value)
        if valid:
            remember(seen, value)
        return valid

    return check_new


NEW: dict[str, Callable[[str], bool]] = {
    "base64": primitives.is_base64,
    "code": _add_cache(SEEN["code"], primitives.is_code),
    "date": _add_cache(SEEN["date"], primitives.is_date),
    "id": _add_cache(SEEN["id"], primitives.is_id),
    "uri": _add_cache(SEEN["uri"], primitives.is_uri),
}
"""The checks of values that are not in a cache. A check adds valid values to its cache, if it has one."""


def is_valid_xhtml(text: str) -> bool:
    """Return True if the narrative has no issue."""
    return check_xhtml(text) is None


def build_binding_check(value_set: str) -> Callable[[Any], bool]:
    """Return a function that checks whether a CodeableConcept, a Struct, has a coding in the value set."""
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


class ReferenceTargets:
    """The resource types that a Reference may refer to (empty: any), and a cache of references to them."""

    def __init__(self, types: frozenset[str]) -> None:
        self.types = types
        self.seen: set[str] = set()
        self._known = load_rules().resource_types
        self._is_literal = compile_literal_reference(types or self._known).fullmatch

    def allow(self, reference: Any, scope: ContainedScope) -> bool:
        """Return True if the reference (a Struct) is known to refer to one of the types."""
        literal: str | None = reference.reference
        stated: str | None = reference.type
        if literal is None:
            return not self.types or stated in self.types or stated not in self._known
        if stated is None and self._is_literal(literal):
            remember(self.seen, literal)
            return True
        target = scope.use(literal) if literal.startswith("#") else resolve_target_type(literal)
        if target is None:
            return False
        if stated is not None and stated != target and stated in self._known:
            if target:
                return False
            target = stated
        return not self.types or not target or target in self.types


@cache
def get_reference_targets(types: frozenset[str]) -> ReferenceTargets:
    """Return one shared ReferenceTargets for all elements with the same target types."""
    return ReferenceTargets(types)
