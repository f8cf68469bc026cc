"""Evaluation of invariants with the FHIRPath compiler (``fhir_assets.fhir.path``)."""

from functools import lru_cache
from typing import Any

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.path import CompiledPath, compile_path
from fhir_assets.fhir.validation.rules import PRIMITIVES, Invariant

__all__ = ["NOT_EVALUATED", "SUBSUMED", "Invariant", "compile_invariant", "holds"]

SUBSUMED = {
    "ele-1": "the walker reports objects that are empty or have only an id",
    "dom-2": "the walker reports contained resources inside contained resources",
    "ref-1": "the walker resolves references to contained resources when it checks their target type",
    "txt-1": "the check of the type xhtml includes htmlChecks()",
    "txt-2": "the check of the type xhtml includes htmlChecks()",
}
"""Invariants that another check covers, with that check."""

OF_CONTAINED = frozenset({"dom-3", "dom-4", "dom-5"})
"""Invariants that hold for any resource without contained resources: their expressions begin with ``contained``."""

NOT_EVALUATED = {
    "cid-0": "a warning about ChargeItemDefinition.name, an element that R4 does not define",
    "dom-6": "a warning for every resource without narrative; it would appear on almost all resources",
}
"""Invariants that are not evaluated, with the reason."""


@lru_cache(maxsize=4096)
def compile_invariant(expression: str, type_: str, resource_type: str) -> CompiledPath | None:
    """Compile an expression for a focus and a ``%resource`` of these types; None if it cannot be compiled."""
    root_type = None if type_ in PRIMITIVES else type_  # ras-1 reads elements of Range, but the value may be a decimal
    try:
        return compile_path(expression, root_type=root_type, resource_type=resource_type)
    except FhirPathError:
        return None


def holds(rule: Invariant, type_: str, focus: Any, resource: dict[str, Any], root: dict[str, Any]) -> bool | None:
    """Evaluate an invariant on ``focus``: True if it holds, False if not, None if it cannot be evaluated.

    An empty result counts as true, because definitions use expressions such as
    ``reference.startsWith('#').not() or …`` even for a Reference without ``reference``.
    """
    if rule.key in SUBSUMED or rule.key in NOT_EVALUATED:
        return True
    if rule.key in OF_CONTAINED and "contained" not in focus:
        return True
    path = compile_invariant(rule.expression, type_, str(resource["resourceType"]))
    if path is None:
        return None
    try:
        return path.test(focus, resource=resource, root=root) is not False
    except Exception:  # the resource may be invalid in any way, and fhirpathpy may raise any exception
        return None
