"""Required bindings: membership of codes and codings in value sets.

See https://hl7.org/fhir/R4/terminologies.html#required.
"""

import re
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from fhir_assets.fhir.validation.rules import load_rules

_TOKEN = r"[A-Za-z0-9!#$&^_.+\-]+"

GRAMMARS: dict[str, tuple[str, Callable[[str], object]]] = {
    "http://hl7.org/fhir/ValueSet/mimetypes": (
        "urn:ietf:bcp:13",
        re.compile(rf"{_TOKEN}/({_TOKEN}|\*)( ?; ?{_TOKEN}=(\"[^\"]*\"|[^\s;\"]+))*|xml|json|ttl").fullmatch,
    ),
    "http://hl7.org/fhir/ValueSet/currencies": ("urn:iso:std:iso:4217", re.compile(r"[A-Z]{3}").fullmatch),
    "http://hl7.org/fhir/ValueSet/ucum-units": ("http://unitsofmeasure.org", re.compile(r"[!-~]+").fullmatch),
    "http://loinc.org/vs/LL379-9": ("http://loinc.org", re.compile(r"LA[0-9]+-[0-9]").fullmatch),
}
"""Value sets whose codes cannot be enumerated: the code system and a test of the syntax of its codes.

The short forms ``xml``, ``json`` and ``ttl`` are allowed in addition to MIME types
(https://hl7.org/fhir/R4/http.html#mime-type).
"""


@cache
def list_codes(value_set: str) -> Collection[str] | None:
    """Return the codes of a value set, from all its code systems; None if the value set is in ``GRAMMARS``."""
    systems = load_rules().value_sets[value_set]
    return None if systems is None else frozenset().union(*systems.values())


def allows_code(value_set: str, code: str) -> bool:
    """Return True if the code is in the value set. An element of type ``code`` implies the code system."""
    codes = list_codes(value_set)
    return code in codes if codes is not None else bool(GRAMMARS[value_set][1](code))


def allows_coding(value_set: str, coding: Mapping[str, Any]) -> bool:
    """Return True if the system and code of a Coding are in the value set."""
    system, code = coding.get("system"), coding.get("code")
    if not isinstance(system, str) or not isinstance(code, str):
        return False
    systems = load_rules().value_sets[value_set]
    if systems is not None:
        return code in systems.get(system, ())
    grammar_system, grammar = GRAMMARS[value_set]
    return system == grammar_system and bool(grammar(code))
