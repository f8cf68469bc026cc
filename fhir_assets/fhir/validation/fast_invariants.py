"""Python conditions for invariants, which the fast path tests on decoded Structs.

Each condition is *sufficient*: if it is true, the FHIRPath expression of the invariant is true; if it is false, the
walker decides. In a condition, ``o`` is the Struct, ``c`` the ContainedScope, and ``{value}`` the number of values
given for the choice element ``value[x]``.
"""

from datetime import datetime

CLINICAL = "http://terminology.hl7.org/CodeSystem/condition-clinical"

SUFFICIENT_CONDITIONS = {
    "age-1": "o.code is not None and (o.system is None or o.system == UCUM) and o.value is not None and o.value > 0",
    "ait-1": "o.clinicalStatus is not None",
    "ait-2": "o.clinicalStatus is None or not has_code(o.verificationStatus, 'entered-in-error')",
    "att-1": "o.data is None or o.contentType is not None",
    "con-1": "o.summary is not None or o.assessment is not None",
    "con-2": "o.code is not None or o.detail is not None",
    "con-3": "o.clinicalStatus is not None",
    "con-4": "not {abatement} or has_any(o.clinicalStatus, ABATED)",
    "con-5": "o.clinicalStatus is None or not has_code(o.verificationStatus, 'entered-in-error')",
    "cpl-3": "o.detail is None or o.reference is None",
    "cpt-2": "o.value is None or o.system is not None",
    "ctm-1": "o.onBehalfOf is None",
    "dom-3": "o.contained is None or c.all_used()",
    "dom-4": "True",
    "dom-5": "True",
    "drq-1": "(o.path is None) != (o.searchParam is None)",
    "drq-2": "(o.path is None) != (o.searchParam is None)",
    "drt-1": "o.code is None or (o.system == UCUM and o.value is not None)",
    "exp-1": "o.expression is not None or o.reference is not None",
    "ext-1": "(o.extension is not None) != ({value} != 0)",
    "gol-1": "not {detail} or o.measure is not None",
    "imm-1": "o.documentType is not None or o.reference is not None",
    "mad-1": "o.dose is not None or {rate} != 0",
    "mdd-1": "o.whenHandedOver is None or o.whenPrepared is None or in_order(o.whenPrepared, o.whenHandedOver)",
    "obs-3": "o.low is not None or o.high is not None or o.text is not None",
    "obs-6": "o.dataAbsentReason is None or not {value}",
    "obs-7": "not {value} or o.component is None or not shares_coding(o.code, o.component)",
    "org-1": "o.identifier is not None or o.name is not None",
    "org-2": "o.use != 'home'",
    "org-3": "o.use != 'home'",
    "pat-1": "o.name is not None or o.telecom is not None or o.address is not None or o.organization is not None",
    "per-1": "o.start is None or o.end is None or in_order(o.start, o.end)",
    "ppc-1": "o.policy is not None or o.policyRule is not None",
    "ppc-2": "o.patient is not None",
    "ppc-3": "o.patient is not None",
    "ppc-4": "o.patient is not None",
    "ppc-5": "o.patient is not None",
    "prr-1": "o.orderDetail is None or o.code is not None",
    "qty-3": "o.code is None or o.system is not None",
    "rat-1": "o.numerator is not None and o.denominator is not None",
    "rng-2": "o.low is None or o.high is None or smaller(o.low, o.high)",
    "tim-1": "o.duration is None or o.durationUnit is not None",
    "tim-2": "o.period is None or o.periodUnit is not None",
    "tim-4": "o.duration is None or o.duration > 0",
    "tim-5": "o.period is None or o.period > 0",
    "tim-6": "o.periodMax is None or o.period is not None",
    "tim-7": "o.durationMax is None or o.duration is not None",
    "tim-8": "o.countMax is None or o.count is not None",
    "tim-9": "o.offset is None",
    "tim-10": "o.timeOfDay is None or o.when is None",
    "trd-1": "o.data is None or not {timing}",
}
"""The conditions by the key of the invariant. ``dom-4`` and ``dom-5`` are tested on each contained resource
(``fast_path``).
"""


def in_order(start: str, end: str) -> bool:
    """Return True if start <= end is certain: same format and zone, or two different instants with a time."""
    if len(start) == len(end) and start[19:] == end[19:]:
        return start <= end
    if len(start) < 20 or len(end) < 20:
        return False
    try:
        return datetime.fromisoformat(start) < datetime.fromisoformat(end)  # digits beyond microseconds are dropped
    except ValueError:
        return False


def has_code(concept: object, code: str) -> bool:
    """Return True if a coding of the CodeableConcept has the code, in any system."""
    codings = getattr(concept, "coding", None) or ()
    return any(coding.code == code for coding in codings)


ABATED = frozenset((CLINICAL, code) for code in ("resolved", "remission", "inactive"))


def has_any(concept: object, pairs: frozenset[tuple[str, str]]) -> bool:
    """Return True if a coding of the CodeableConcept is one of the pairs of system and code."""
    codings = getattr(concept, "coding", None) or ()
    return any((coding.system, coding.code) in pairs for coding in codings)


def smaller(low: object, high: object) -> bool:
    """Return True if low < high is certain: both quantities have the same unit, and the floats are ordered."""
    a, b = low, high
    same = a.unit == b.unit and a.system == b.system and a.code == b.code  # type: ignore[attr-defined]
    return bool(same and a.value is not None and b.value is not None and a.value < b.value)  # type: ignore[attr-defined]


def shares_coding(code: object, components: list[object]) -> bool:
    """Return True if a component may have a coding of ``Observation.code``: the codes are equal in any system."""
    codes = {coding.code for coding in getattr(code, "coding", None) or ()}
    return any(
        coding.code in codes
        for component in components
        for coding in component.code.coding or ()  # type: ignore[attr-defined]
    )
