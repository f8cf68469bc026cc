"""The invariants of the definitions, evaluated by the project's FHIRPath compiler."""

from functools import lru_cache
from typing import Any

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.path import CompiledPath, compile_path
from fhir_assets.fhir.validation.rules import PRIMITIVES, Invariant

__all__ = ["NOT_EVALUATED", "SUBSUMED", "Invariant", "compiled", "holds"]

SUBSUMED = {
    "ele-1": "objects with no names or only an id are found while walking the structure",
    "dom-2": "the walk into contained resources refuses others inside them",
    "ref-1": "references to contained resources are resolved where their target type is checked",
    "txt-1": "htmlChecks() is the check of the type xhtml",
    "txt-2": "htmlChecks() is the check of the type xhtml",
}
"""Invariants with a check of their own, and where it stands."""

OF_CONTAINED = frozenset({"dom-3", "dom-4", "dom-5"})
"""Invariants that hold where nothing is contained: their expressions begin with ``contained``."""

NOT_EVALUATED = {
    "cid-0": "looks for ChargeItemDefinition.name, which R4 has not (a warning)",
    "dom-6": "recommends narrative in every resource (a warning): said of each resource, it says nothing",
}
"""Invariants that are left out, and why."""


@lru_cache(maxsize=4096)
def compiled(expression: str, type_: str, resource_type: str) -> CompiledPath | None:
    """An invariant's expression for a focus and a ``%resource`` of these types; None if it cannot be compiled."""
    root_type = None if type_ in PRIMITIVES else type_  # ras-1 looks into a Range where a decimal may stand
    try:
        return compile_path(expression, root_type=root_type, resource_type=resource_type)
    except FhirPathError:
        return None


def holds(rule: Invariant, type_: str, focus: Any, resource: dict[str, Any], root: dict[str, Any]) -> bool | None:
    """Does the invariant hold on ``focus``? None if it cannot be evaluated there.

    An empty result holds: the definitions write ``reference.startsWith('#').not() or …`` for References without one.
    """
    if rule.key in SUBSUMED or rule.key in NOT_EVALUATED:
        return True
    if rule.key in OF_CONTAINED and "contained" not in focus:
        return True
    path = compiled(rule.expression, type_, str(resource["resourceType"]))
    if path is None:
        return None
    try:
        return path.test(focus, resource=resource, root=root) is not False
    except Exception:  # a resource may be broken in any way, and fhirpathpy may raise anything
        return None
