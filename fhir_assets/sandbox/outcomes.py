"""Errors of the sandbox server, each with an OperationOutcome."""

from collections.abc import Mapping

import orjson


def build_operation_outcome(severity: str, code: str, diagnostics: str) -> dict[str, object]:
    """Return an OperationOutcome with one issue. ``code`` is one of https://hl7.org/fhir/R4/valueset-issue-type.html."""
    return {
        "resourceType": "OperationOutcome",
        "issue": [{"severity": severity, "code": code, "diagnostics": diagnostics}],
    }


class Refusal(Exception):
    """A request is answered with an error status and an OperationOutcome."""

    def __init__(self, status: int, code: str, diagnostics: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(diagnostics)
        self.status = status
        self.outcome = build_operation_outcome("error", code, diagnostics)
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The OperationOutcome as JSON."""
        return orjson.dumps(self.outcome)
