"""Refused exports: explains the refusal by the requested types and level."""

import re
from collections import Counter
from collections.abc import Sequence

from fhir_assets.catalog import BY_NAME
from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.bulk.manifest import ExportRequest
from fhir_assets.fhir.client.response import FhirResponse
from fhir_assets.fhir.outcome import summarize_issues

REFUSALS = frozenset({400, 403, 404, 405, 406, 409, 410, 412, 415, 422, 501})
"""Statuses that refuse the export itself; the request may name a type or a level that the server does not offer."""


class ExportRefused(ServerRefused):
    """The server refuses an export.

    ``resource_types`` are those of the requested types that it refuses; none if that is not known, or all of them.
    """

    def __init__(self, message: str, resource_types: Sequence[str]) -> None:
        super().__init__(message)
        self.resource_types = tuple(resource_types)


def explain_refusal(response: FhirResponse, request: ExportRequest) -> ExportRefused:
    """Return the error for a kick-off that the server refused.

    The message names the requested types that the server's OperationOutcome names, and no other text of the server.
    """
    labels = response.labels
    codes = ", ".join(dict.fromkeys(summarize_issues(response.body)))
    reason = (
        f"the server refuses the export at level {request.level} ({response.status}{f': {codes}' if codes else ''})"
    )
    named = _find_named(response.body, request.resource_types)
    outside = [] if request.level == "system" else [name for name in request.resource_types if is_outside(name)]
    if not named and not outside and len(request.resource_types) == 1:
        named = list(request.resource_types)
    advice = []
    if named:
        advice.append(f"it refuses {', '.join(named)}: remove the type from {labels.resource_types}")
    if outside:
        advice.append(
            f"the compartment of a patient does not contain {', '.join(outside)}: remove them from "
            f"{labels.resource_types}, or set {labels.export_level} to system"
        )
    if response.status == 403:
        advice.append(f"does the account of {labels.username} or {labels.token} have the permission for each type?")
    elif response.status in (404, 405, 501):
        advice.append(
            f"does the server support Bulk Data Access at this level (see {labels.export_level}), and is there such a "
            "group?"
        )
    if not advice:
        advice.append(
            f"it names no type: shorten {labels.resource_types} to find the one that it does not offer, and check "
            f"{labels.type_filter}"
        )
    refused = named or (outside if len(outside) < len(request.resource_types) else [])
    return ExportRefused(f"{reason}; {'; '.join(advice)}", refused)


def _find_named(body: bytes, resource_types: Sequence[str]) -> list[str]:
    """Return the requested types that a refusal names more often than the others; it may repeat the whole request."""
    words = Counter(re.findall(r"[A-Za-z]+", body[: 1 << 16].decode("utf-8", "replace")))
    least = min(words[name] for name in resource_types)
    return [name for name in resource_types if words[name] > least]


def is_outside(resource_type: str) -> bool:
    """Return whether no resource of the type is in the compartment of a patient."""
    return resource_type != "Patient" and not BY_NAME[resource_type].patient
