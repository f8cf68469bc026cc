"""Validation issues: the rule names, ``Issue``, ``IssueList``, and their form as an OperationOutcome."""

from collections import Counter
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
UNLISTED = "unlisted"

MAX_ISSUES = 100
"""The largest number of errors, and of warnings, that are listed for one resource. The others are counted."""

_ISSUE_TYPES = {
    JSON: "invalid",
    STRUCTURE: "structure",
    CARDINALITY: "required",
    PRIMITIVE: "value",
    REQUIRED_BINDING: "code-invalid",
    REFERENCE_TARGET: "value",
    UNLISTED: "incomplete",
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


class IssueList:
    """Collects issues: the first ``limit`` errors and as many warnings, and the numbers of the others."""

    __slots__ = ("_counts", "_limit", "_listed")

    def __init__(self, limit: int = MAX_ISSUES) -> None:
        self._limit = limit
        self._listed: list[Issue] = []
        self._counts: Counter[Severity] = Counter()

    @property
    def count(self) -> int:
        """The number of issues, listed or not."""
        return self._counts.total()

    def add(self, issue: Issue) -> None:
        """Add an issue."""
        self._counts[issue.severity] += 1
        if self._counts[issue.severity] <= self._limit:
            self._listed.append(issue)

    def close(self, path: str = "Resource") -> tuple[Issue, ...]:
        """Return the issues in the order of their addition, then one for each severity with issues not listed."""
        unlisted = [(severity, count - self._limit) for severity, count in self._counts.items() if count > self._limit]
        return (
            *self._listed,
            *(Issue(UNLISTED, severity, path, f"{count:,} more are not listed") for severity, count in unlisted),
        )


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
