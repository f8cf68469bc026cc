"""Responses of a FHIR server, and the errors that are raised for their status or body."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from fhir_assets.errors import NotFhir, ServerRefused, ServerUnavailable
from fhir_assets.fhir.client.clock import read_age, read_date
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels
from fhir_assets.retries import TransientFailure


class HttpStatusError(ServerRefused):
    """A ServerRefused with its HTTP status, for callers that handle a status such as 404, 410 or 412."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class InternalServerError(ServerUnavailable):
    """A server answered every attempt with 500, which some servers do for a parameter that they do not support."""


@dataclass(frozen=True, slots=True)
class FhirResponse:
    """A complete response. ``url`` is its address after redirects; ``body`` is decompressed.

    ``labels`` are the names of the settings in messages about the response.
    """

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    labels: ServerLabels = DEFAULT_LABELS

    @property
    def date(self) -> datetime | None:
        """The server's time of the response (its Date header) in UTC; None without a valid Date header."""
        return read_date(self.headers)

    @property
    def age(self) -> int:
        """The seconds that a cache has kept the response; 0 if it comes from the server itself."""
        return read_age(self.headers)


def invalid_json_failure(response: FhirResponse) -> TransientFailure:
    """Return the failure to raise for a body that is not complete JSON: truncated, or another format such as HTML."""
    base_url = response.labels.base_url
    start = response.body[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"<"):
        kind = "HTML" if b"<html" in start.lower() or b"<!doctype" in start.lower() else "XML"
        return TransientFailure(
            f"the answer is {kind}, not FHIR in JSON",
            advice=f"is {base_url} the base of a FHIR server, without a login page in front of it?",
            final=NotFhir,
        )
    if not start.startswith(b"{"):
        reason = "the answer is not FHIR in JSON" if start else "the answer is empty"
        return TransientFailure(reason, advice=f"is {base_url} the base of a FHIR server?", final=NotFhir)
    return TransientFailure(
        "the answer is incomplete JSON",
        advice=f"it was truncated or damaged in transit: a smaller {response.labels.page_size} may help",
        final=NotFhir,
    )
