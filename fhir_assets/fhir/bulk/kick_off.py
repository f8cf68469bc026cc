"""The refusal of an export by the server, explained by the types and the level that were asked for."""

import re

from fhir_assets.catalog import BY_NAME
from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.bulk.manifest import ExportRequest
from fhir_assets.fhir.client.response import FhirResponse
from fhir_assets.fhir.outcome import summarize_issues

REFUSALS = frozenset({400, 403, 404, 405, 406, 409, 410, 412, 415, 422, 501})
"""Statuses that refuse the export itself; the request may name a type or a level that the server does not offer."""


def explain_refusal(response: FhirResponse, request: ExportRequest) -> ServerRefused:
    """Return the error for a kick-off that the server refused.

    The message names the requested types that the server's OperationOutcome names, and no other text of the server.
    """
    labels = response.labels
    codes = ", ".join(dict.fromkeys(summarize_issues(response.body)))
    reason = (
        f"the server refuses the export at level {request.level} ({response.status}{f': {codes}' if codes else ''})"
    )
    words = set(re.findall(r"[A-Za-z]+", response.body[: 1 << 16].decode("utf-8", "replace")))
    named = [name for name in request.resource_types if name in words]
    outside = [] if request.level == "system" else [name for name in request.resource_types if is_outside(name)]
    advice = []
    if named and len(named) < len(request.resource_types):
        advice.append(f"it names {', '.join(named)}: remove the type from {labels.resource_types}")
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
    return ServerRefused(f"{reason}; {'; '.join(advice)}")


def is_outside(resource_type: str) -> bool:
    """Return whether no resource of the type is in the compartment of a patient."""
    return resource_type != "Patient" and not BY_NAME[resource_type].patient
