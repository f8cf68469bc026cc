"""Validation issues: the rule names, the class ``Issue``, and its form as an OperationOutcome."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]

JSON = "json"
STRUCTURE = "structure"
CARDINALITY = "cardinality"
PRIMITIVE = "primitive"
REQUIRED_BINDING = "required-binding"
REFERENCE_TARGET = "reference-target"
INVARIANT = "invariant:"

_ISSUE_TYPES = {
    JSON: "invalid",
    STRUCTURE: "structure",
    CARDINALITY: "required",
    PRIMITIVE: "value",
    REQUIRED_BINDING: "code-invalid",
    REFERENCE_TARGET: "value",
}


@dataclass(frozen=True, slots=True)
class Issue:
    """One issue of a resource. No attribute contains a value of the resource.

    ``rule`` is the name of the violated rule (``structure``, ``invariant:obs-6``), ``path`` the element as a FHIRPath
    expression (``Patient.contact[0].name``), ``message`` a description of the expected value.
    """

    rule: str
    severity: Severity
    path: str
    message: str


def build_operation_outcome(issues: Iterable[Issue]) -> dict[str, Any]:
    """Return the issues as an OperationOutcome (https://hl7.org/fhir/R4/operationoutcome.html).

    ``details.text`` holds the message, ``diagnostics`` the rule. Without issues, the outcome has one entry of severity
    ``information``, because an OperationOutcome needs at least one.
    """
    entries = [
        {
            "severity": issue.severity,
            "code": _ISSUE_TYPES.get(issue.rule, "invariant"),
            "details": {"text": issue.message},
            "diagnostics": issue.rule,
            "expression": [issue.path],
        }
        for issue in issues
    ]
    all_ok = [{"severity": "information", "code": "informational", "details": {"text": "no issues found"}}]
    return {"resourceType": "OperationOutcome", "issue": entries or all_ok}
