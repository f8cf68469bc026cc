"""The client's side of Bulk Data Access (https://hl7.org/fhir/uv/bulkdata/STU2/export.html): ask, wait, download."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import orjson

from fhir_assets.errors import ConfigurationError, NotFhir, PermanentError, ServerUnavailable
from fhir_assets.fhir.bulk.downloads import Downloads
from fhir_assets.fhir.client.http import FhirClient, FhirResponse, HttpStatusError, invalid_json_failure
from fhir_assets.fhir.record import parse_instant
from fhir_assets.retries import RetryPolicy, read_retry_after

FIRST_POLL = 1.0
LONGEST_POLL = 60.0
_GOODBYE = RetryPolicy(attempts=3, max_wait=2, max_retry_after=5, budget=30)
"""That an export is done with is good to know for the server, but nobody waits for it."""
_PASSING_CODES = frozenset(
    {"transient", "lock-error", "no-store", "exception", "timeout", "incomplete", "throttled", "rate-limit"}
)
"""Codes of an OperationOutcome (code system issue-type, below ``transient``) that say nothing about the export."""
_LEVEL = re.compile(r"system|patient|group/[A-Za-z0-9\-.]{1,64}")
_PATHS = {"system": "$export", "patient": "Patient/$export"}


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What is asked for. ``level``: ``system``, ``patient`` or ``group/<id>``; ``type_filter`` as the server takes it,
    several searches with commas between them.
    """

    level: str
    resource_types: tuple[str, ...]
    since: datetime | None
    type_filter: str = ""

    def query(self) -> str:
        """The query of the kick-off: values joined with commas, and what commas a search has itself as %2C."""
        given = {
            "_outputFormat": "application/fhir+ndjson",
            "_type": ",".join(self.resource_types),
            "_since": self.since.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            if self.since
            else "",
            "_typeFilter": self.type_filter,
        }
        return "&".join(f"{name}={quote(value, safe=',:$/')}" for name, value in given.items() if value)


@dataclass(frozen=True, slots=True)
class ExportFile:
    """A file of a finished export. ``count`` is what the server says it holds, None if it does not say."""

    resource_type: str
    url: str
    count: int | None


@dataclass(frozen=True, slots=True)
class ExportManifest:
    """What a finished export consists of. All that was updated before ``transaction_time`` is in it."""

    transaction_time: datetime
    needs_token: bool
    output: tuple[ExportFile, ...]
    deleted: tuple[ExportFile, ...] = ()
    errors: tuple[ExportFile, ...] = ()


@dataclass(slots=True)
class ExportPending:
    """An export that is not ready: when to ask again, in seconds, and what the server says of its progress."""

    seconds: float
    progress: str = field(default="")


class ExportGone(NotFhir):
    """The server knows the export no more."""


class ExportFailed(PermanentError):
    """The server says that the export failed, or refuses to say how it is doing: only a new one can help."""


def validate_level(level: str) -> str:
    """``level`` if it is one. Raises ConfigurationError."""
    if not _LEVEL.fullmatch(level):
        raise ConfigurationError("FHIR_BULK_LEVEL must be system, patient or group/<id>")
    return level


class BulkClient:
    """Exports of one FHIR server."""

    def __init__(self, client: FhirClient) -> None:
        self._client = client

    def kick_off(self, request: ExportRequest) -> str:
        """Ask for an export. Returns the URL of its status, to be kept before anything else is done."""
        path = _PATHS.get(request.level) or f"Group/{request.level.removeprefix('group/')}/$export"

        def read(answer: FhirResponse) -> str:
            if answer.status == 200:
                failure = invalid_json_failure(answer)
                failure.reason = "the server answers the export with 200, not 202"
                failure.advice = "does it have Bulk Data, is FHIR_BASE_URL right, is there a login page before it?"
                raise failure
            place = answer.headers.get("Content-Location")
            if not place:
                raise NotFhir("the server takes the export but does not say where its status is (Content-Location)")
            return self._client.resolve(place, answer.url)

        # A kick-off whose answer got lost is sent again: at worst the server makes an export that nobody fetches.
        return self._client.get(
            f"{path}?{request.query()}",
            read,
            headers={"Accept": "application/fhir+json", "Prefer": "respond-async"},
            expect={200, 202},
        )

    def poll(self, status_url: str, tried: int) -> ExportPending | ExportManifest:
        """How an export is doing, asked for the ``tried``-th time.

        Raises Vanished, ExportFailed, NotFhir where the export is lost; ServerUnavailable and Refusal where it can be
        asked again later.
        """

        def read(answer: FhirResponse) -> ExportPending | ExportManifest:
            if answer.status == 200:
                return self._manifest(answer)
            if answer.status >= 500:
                self._check_failed(answer)
            asked = read_retry_after(answer.headers.get("Retry-After"))
            own = min(LONGEST_POLL, FIRST_POLL * 1.5**tried)
            seconds = own if asked is None else min(max(asked, 0.1), 10 * LONGEST_POLL)
            return ExportPending(seconds, answer.headers.get("X-Progress", "")[:100])

        try:
            # 429 is no failure of a poll: it says when to come again, as 202 does.
            return self._client.get(
                status_url,
                read,
                headers={"Accept": "application/json, application/fhir+json;q=0.9"},
                expect={200, 202, 429, 500},
            )
        except HttpStatusError as refusal:
            if refusal.status in (404, 410):
                raise ExportGone("the server knows the export no more: it is asked for anew") from None
            if refusal.status in (401, 403):
                raise
            raise ExportFailed(
                f"the server answered {refusal.status} to how the export is doing: run again to ask for a new one"
            ) from None

    def _check_failed(self, answer: FhirResponse) -> None:
        """Raise what an answer of 500 means: with an OperationOutcome of no passing code, the export failed."""
        codes: list[str] = []
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            codes = [str(issue["code"])[:40] for issue in orjson.loads(answer.body)["issue"]]
        if codes and not _PASSING_CODES.intersection(codes):
            raise ExportFailed(
                f"the server says that the export failed ({', '.join(codes[:5])}): run again to ask for a new one, and "
                "ask its administrator if that one fails too"
            )
        self._client.raise_for_status(answer.status, answer.headers, "GET", answer.url)

    def delete_export(self, status_url: str) -> None:
        """Tell the server that the export is done with, or not wanted any more; that it forgot already is fine."""
        self._client.send("DELETE", status_url, expect={200, 202, 204, 404, 410}, policy=_GOODBYE)

    def open_downloads(self) -> Downloads:
        """What ``lines`` downloads with, for a ``with`` block."""
        return Downloads(self._client)

    def read_lines(self, downloads: Downloads, file: ExportFile, *, needs_token: bool) -> Iterator[list[bytes]]:
        """The lines of a file, without blank ones, some at a time. A connection that breaks is taken up where it was.

        Raises Vanished if the server has the file no more, NotFhir if it holds another number of lines than said.
        """
        count = 0
        try:
            for lines in downloads.read_lines(file.url, authorized=needs_token, expected=file.count):
                count += len(lines)
                yield lines
        except HttpStatusError as refusal:
            if refusal.status in (404, 410):
                raise ExportGone("the server has a file of the export no more: the export is asked for anew") from None
            raise
        if file.count is not None and count != file.count:
            raise NotFhir(
                f"a file of {file.resource_type} holds {count} resources, but the server's manifest says {file.count}: "
                "nothing of this export is loaded; run again to ask for a new one"
            )

    def _manifest(self, answer: FhirResponse) -> ExportManifest:
        try:
            found = orjson.loads(answer.body)
        except orjson.JSONDecodeError:
            failure = invalid_json_failure(answer)
            failure.final = ServerUnavailable  # the export is still there, whatever stood before it
            raise failure from None
        try:
            moment = parse_instant(found["transactionTime"])
            if moment is None:
                raise ValueError
            return ExportManifest(
                moment,
                found.get("requiresAccessToken") is not False,
                self._files(found["output"], answer.url),
                *(self._files(found.get(name) or [], answer.url) for name in ("deleted", "error")),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise NotFhir(
                "the server's answer to the export is no manifest of Bulk Data Access: run again to ask for a new "
                "export, and show its administrator if that one has none either"
            ) from None

    def _files(self, files: list[dict[str, Any]], page: str) -> tuple[ExportFile, ...]:
        found = tuple(ExportFile(file["type"], urljoin(page, file["url"]), file.get("count")) for file in files)
        for file in found:
            named = isinstance(file.resource_type, str) and urlsplit(file.url).scheme in ("http", "https")
            if not named or type(file.count) not in (int, type(None)):
                raise ValueError
        return found


def manifest_to_json(manifest: ExportManifest) -> dict[str, Any]:
    """The manifest as JSON, to be kept."""

    def files(which: Sequence[ExportFile]) -> list[dict[str, Any]]:
        return [{"type": file.resource_type, "url": file.url, "count": file.count} for file in which]

    return {
        "transactionTime": manifest.transaction_time.isoformat(),
        "requiresAccessToken": manifest.needs_token,
        "output": files(manifest.output),
        "deleted": files(manifest.deleted),
        "error": files(manifest.errors),
    }


def manifest_from_json(found: dict[str, Any]) -> ExportManifest:
    """The manifest that ``manifest_to_json`` kept."""

    def files(name: str) -> tuple[ExportFile, ...]:
        return tuple(ExportFile(file["type"], file["url"], file["count"]) for file in found[name])

    moment = datetime.fromisoformat(found["transactionTime"])
    return ExportManifest(moment, found["requiresAccessToken"], files("output"), files("deleted"), files("error"))
