"""The client side of Bulk Data Access: kick-off, polling, download, deletion of an export
(https://hl7.org/fhir/uv/bulkdata/STU2/export.html).
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import orjson

from fhir_assets.control_characters import escape_control_characters
from fhir_assets.errors import ConfigurationError, NotFhir, PermanentError, ServerRefused, ServerUnavailable
from fhir_assets.fhir.bulk.downloads import Downloads
from fhir_assets.fhir.bulk.kick_off import REFUSALS, explain_refusal
from fhir_assets.fhir.bulk.manifest import ExportFile, ExportManifest, ExportRequest, parse_manifest
from fhir_assets.fhir.bulk.manifest_parts import ManifestParts
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.response import FhirResponse, HttpStatusError, invalid_json_failure
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels
from fhir_assets.fhir.transport.origin import format_origin
from fhir_assets.retries import RetryPolicy, read_retry_after

FIRST_POLL_SECONDS = 1.0
_NO_CACHE = {"Cache-Control": "no-cache"}
"""A cache in front of the server may return an earlier "not ready" (202), or an earlier manifest with expired links."""
_REFUSED_FILE = frozenset({400, 401, 403, 404, 410})
"""The statuses with which object stores answer for an expired link, and for a file that was deleted."""
MAX_POLL_SECONDS = 60.0
_DELETE_POLICY = RetryPolicy(attempts=3, max_wait=2, max_retry_after=5, budget=30)
"""Retries of the deletion of an export. The deletion only frees space at the server, so they are few."""
_TRANSIENT_CODES = frozenset(
    {"transient", "lock-error", "no-store", "exception", "timeout", "incomplete", "throttled", "rate-limit"}
)
"""Codes of an OperationOutcome (code system issue-type, below ``transient``) that do not mean a failed export."""
_LEVEL = re.compile(r"system|patient|group/[A-Za-z0-9\-.]{1,64}")
_PATHS = {"system": "$export", "patient": "Patient/$export"}


@dataclass(slots=True)
class ExportPending:
    """The status of an export that is not ready.

    ``seconds`` is the wait before the next poll; ``progress`` is the server's X-Progress text.
    """

    seconds: float
    progress: str = ""


class ExportGone(NotFhir):
    """The server no longer has the export or one of its files."""


class LinkExpired(ServerRefused):
    """The server or its object store refuses a file of the export, possibly because its link has expired.

    The status of the export may have new links.
    """


@dataclass(frozen=True, slots=True)
class KickOff:
    """An export that the server has accepted: the URL of its status, and the ``Date`` of the server's response."""

    status_url: str
    date: datetime | None


class ExportFailed(PermanentError):
    """The export failed, or the server refuses its status. Only a new export can help."""


def validate_level(level: str, labels: ServerLabels = DEFAULT_LABELS) -> str:
    """Return ``level``. Raises ConfigurationError if it is not ``system``, ``patient`` or ``group/<id>``."""
    if not _LEVEL.fullmatch(level):
        raise ConfigurationError(f"{labels.export_level} must be system, patient or group/<id>")
    return level


class BulkClient:
    """The bulk exports of one FHIR server."""

    def __init__(self, client: FhirClient) -> None:
        self._client = client

    def kick_off(self, request: ExportRequest) -> KickOff:
        """Request an export. The caller stores the URL of its status before it does anything else.

        Raises ServerRefused with the types and the level that the server may not offer.
        """
        path = _PATHS.get(request.level) or f"Group/{request.level.removeprefix('group/')}/$export"

        def read(response: FhirResponse) -> KickOff:
            if response.status in REFUSALS:
                raise explain_refusal(response, request)
            if response.status == 200:
                failure = invalid_json_failure(response)
                failure.reason = "the server answers the export with 200, not 202"
                failure.advice = (
                    f"does it support Bulk Data Access, is {response.labels.base_url} right, is there a login page in "
                    "front of it?"
                )
                raise failure
            location = response.headers.get("Content-Location")
            if not location:
                raise NotFhir("the server accepts the export but does not say where its status is (Content-Location)")
            return KickOff(self._client.resolve(location, response.url), response.date)

        # A kick-off whose response is lost is sent again. The first export, if any, is never downloaded.
        return self._client.get(
            f"{path}?{request.query()}",
            read,
            headers={"Accept": "application/fhir+json", "Prefer": "respond-async", **_NO_CACHE},
            expect={200, 202, *REFUSALS},
        )

    def resolve(self, link: str, page_url: str) -> str:
        """Return the absolute URL of a link of the server. Raises NotFhir if it points to another origin."""
        return self._client.resolve(link, page_url)

    def poll(self, status_url: str, polls: int) -> ExportPending | ExportManifest:
        """Return the status of an export after ``polls`` earlier polls: pending, or the manifest of a finished export.

        Raises ExportGone, ExportFailed or NotFhir if the export is lost; ServerUnavailable or HttpStatusError if a
        later poll may succeed.
        """

        def read(response: FhirResponse) -> ExportPending | ExportManifest:
            if response.status == 200:
                return self._read_manifest(response)
            if response.status >= 500:
                self._raise_for_failure(response)
            retry_after = read_retry_after(response.headers.get("Retry-After"))
            backoff = min(MAX_POLL_SECONDS, FIRST_POLL_SECONDS * 1.5**polls)
            seconds = backoff if retry_after is None else min(max(retry_after, 0.1), 10 * MAX_POLL_SECONDS)
            return ExportPending(seconds, escape_control_characters(response.headers.get("X-Progress", "")[:100]))

        try:
            # 429 does not count as a failed poll: like 202, it carries the time of the next poll.
            return self._client.get(
                status_url,
                read,
                headers={"Accept": "application/json, application/fhir+json;q=0.9", **_NO_CACHE},
                expect={200, 202, 429, 500},
            )
        except HttpStatusError as error:
            if error.status in (404, 410):
                raise ExportGone("the server no longer has the export: a new one is requested") from None
            if error.status in (401, 403):
                raise
            raise ExportFailed(
                f"the server answered {error.status} to a request for the export's status: run again to request a new "
                "export"
            ) from None

    def _raise_for_failure(self, response: FhirResponse) -> NoReturn:
        """Raise the error for a 5xx status: ExportFailed if the OperationOutcome has no transient code."""
        codes: list[str] = []
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            codes = [str(issue["code"])[:40] for issue in orjson.loads(response.body)["issue"]]
        if codes and not _TRANSIENT_CODES.intersection(codes):
            raise ExportFailed(
                f"the server reports that the export failed ({', '.join(codes[:5])}): run again to request a new one, "
                "and ask the server's administrator if that one fails too"
            )
        self._client.raise_for_status(response.status, response.headers, "GET", response.url)

    def count_parts(self) -> ManifestParts:
        """Return a count of the parts of one manifest, which has limits."""
        return ManifestParts(self._client.limits)

    def delete_export(self, status_url: str) -> None:
        """Delete the export at the server. Succeeds if the server has already deleted it."""
        self._client.send("DELETE", status_url, expect={200, 202, 204, 404, 410}, policy=_DELETE_POLICY)

    def open_downloads(self) -> Downloads:
        """Return the connections for ``read_lines``, to be used in a ``with`` block."""
        return Downloads(self._client)

    def read_lines(self, downloads: Downloads, file: ExportFile, *, needs_token: bool) -> Iterator[list[bytes]]:
        """Read the lines of a file in batches, without blank lines. An interrupted download is resumed.

        The number of lines may differ from the manifest's. Raises LinkExpired if the file is refused.
        """
        try:
            url = self._client.rewrite(file.url)
            yield from downloads.read_lines(url, authorized=needs_token, expected=file.count)
        except HttpStatusError as error:
            if error.status in _REFUSED_FILE:
                raise LinkExpired(
                    f"a file of {file.resource_type} at {format_origin(file.url)} is refused ({error.status}): its "
                    "link has run out, or the account may not read it"
                ) from None
            raise

    def _read_manifest(self, response: FhirResponse) -> ExportManifest:
        self._client.limits.check_manifest(response.body)
        try:
            document = orjson.loads(response.body)
        except orjson.JSONDecodeError:
            failure = invalid_json_failure(response)
            failure.final = ServerUnavailable  # a proxy may have answered: the export itself still exists
            raise failure from None
        return parse_manifest(document, response.url, response.date)
