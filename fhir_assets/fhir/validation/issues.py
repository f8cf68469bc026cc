"""What a validation says: issues, and the verdict on one resource."""

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
    """One finding: ``rule`` names what was broken (``structure``, ``invariant:obs-6``), ``path`` where, in FHIRPath
    (``Patient.contact[0].name``), ``message`` what is expected there. It never holds a value of the resource.
    """

    rule: str
    severity: Severity
    path: str
    message: str


def build_operation_outcome(issues: Iterable[Issue]) -> dict[str, Any]:
    """The issues as an OperationOutcome (https://hl7.org/fhir/R4/operationoutcome.html).

    ``details.text`` holds the message, ``diagnostics`` the rule. No issues give one of severity ``information``,
    as an OperationOutcome needs at least one.
    """
    found = [
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
    return {"resourceType": "OperationOutcome", "issue": found or all_ok}
