"""The OperationOutcomes in the answers of a search, which describe the answer.

See https://hl7.org/fhir/R4/search.html#status.
"""

import msgspec

from fhir_assets.fhir.outcome import summarize_issues
from fhir_assets.notices import Notices


class _Issue(msgspec.Struct):
    severity: str | None = None


class _Outcome(msgspec.Struct):
    issue: list[_Issue] | None = None


_decode = msgspec.json.Decoder(_Outcome).decode


def is_error(outcome: bytes) -> bool:
    """Return whether an OperationOutcome means that the answer is incomplete; False for any other resource."""
    return bool(_read_severities(outcome) - {"warning"})


def _read_severities(outcome: bytes) -> set[str | None]:
    try:
        severities = {issue.severity for issue in _decode(outcome).issue or ()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        severities = {None}
    return severities - {"information"}


def note_outcome(notices: Notices, resource_type: str, outcome: bytes) -> None:
    """Add a notice for an OperationOutcome among the entries of a search, unless it is only information.

    An outcome with an issue of severity ``error`` or ``fatal``, or of a severity that is not defined, means that the
    answer is incomplete. The notice contains the codes of the issues, but no text of the server, which may contain
    patient data.
    """
    severities = _read_severities(outcome)
    if not severities:
        return
    codes = ", ".join(summarize_issues(outcome)) or "no code"
    if severities == {"warning"}:
        notices.add(
            "warning",
            "outcome-warning",
            f"the server adds a warning to its answer to a search of {resource_type} ({codes}): see the server's log",
            resource_type,
        )
        return
    notices.add(
        "error",
        "incomplete-answer",
        f"the server reports that its answer to a search of {resource_type} is incomplete ({codes}): see the server's "
        "log, then materialize raw, validated and normalized of the window again",
        resource_type,
    )
