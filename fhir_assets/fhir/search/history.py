"""Deletions, read from the history of a resource type (https://hl7.org/fhir/R4/http.html#history)."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic

import msgspec

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir.client.http import FhirClient, Params
from fhir_assets.fhir.client.response import FhirResponse, HttpStatusError, invalid_json_failure
from fhir_assets.fhir.deletions import DeletionTimes, HistoryEntry
from fhir_assets.fhir.half_surrogates import mask_half_surrogates
from fhir_assets.fhir.record import Deletion
from fhir_assets.fhir.search.pager import PageExpired
from fhir_assets.notices import Notice

_ATTEMPTS = 3


class _Link(msgspec.Struct):
    relation: str | None = None
    url: str | None = None


class _Bundle(msgspec.Struct, rename="camel"):
    resource_type: str = ""
    type: str | None = None
    link: list[_Link] | None = None
    entry: list[HistoryEntry | None] | None = None


_decode = msgspec.json.Decoder(_Bundle).decode


@dataclass(frozen=True, slots=True)
class _HistoryPage:
    url: str
    entries: list[HistoryEntry]
    next_link: str | None
    date: datetime | None


class DeletionHistory:
    """The deletions in a server's history. All other versions are skipped: searches return those."""

    def __init__(self, client: FhirClient, *, page_size: int = 500) -> None:
        self._client = client
        self._page_size = page_size
        self.requested_at: datetime | None = None
        """The server's time at the start of the last history request; None if the response has no Date header."""

    def list_types(self) -> frozenset[str] | None:
        """Return the types for which the server declares a history; None if it names no types."""
        return self._client.capabilities().list_types("history-type")

    def drain_notices(self) -> tuple[Notice, ...]:
        """Return the notices about the history since the last call."""
        return self._client.notices.drain()

    def note_not_offered(self, resource_type: str) -> None:
        """Add the notice that the server has no history of a type."""
        self._client.notices.add(
            "warning",
            "history-not-offered",
            f"{resource_type}: the server offers no history, so that what it deletes stays in the tables until a load "
            "with --full-refresh",
            resource_type,
        )

    def note_refused(self, resource_type: str, error: Exception) -> None:
        """Add the notice that the server refused the history of a type."""
        self._client.notices.add(
            "error",
            "history-refused",
            f"{resource_type}: the history cannot be read, so that deletions are missing ({error}): let the account "
            f"read it, or turn off {self._client.labels.deletions} and load with --full-refresh now and then",
            resource_type,
        )

    def fetch_since(self, resource_type: str, moment: datetime) -> Iterator[Deletion]:
        """Read the deletions of a type since ``moment``, newest first.

        A deletion without a time gets one from its neighbours: see ``DeletionTimes``. A deletion that a newer version
        of the resource follows is left out. A deletion is returned twice if the server's pages expire while they are
        read. A deletion that names no resource is a notice. Raises the errors of ``FhirClient.get``.
        """
        since = moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        params = [("_since", since), ("_count", str(self._page_size))]
        for _ in range(_ATTEMPTS):
            try:
                yield from self._read(resource_type, params, moment)
                return
            except PageExpired:
                continue
        raise ServerUnavailable(
            f"the pages of the history of {resource_type} expire before they can be read, even after {_ATTEMPTS} "
            f"attempts: lower {self._client.labels.page_size}, or let the server keep its pages longer"
        )

    def _read(self, resource_type: str, params: Params, since: datetime) -> Iterator[Deletion]:
        started = monotonic()
        page = self._client.get(f"{resource_type}/_history", _parse_page, params=params)
        self.requested_at = page.date
        # The server's time at the start of the request. Versions missing in the history are newer than that.
        latest = page.date - timedelta(seconds=monotonic() - started) if page.date else None
        times = DeletionTimes(latest=latest, fallback=since)
        links = set()
        what = f"the history of {resource_type}"
        while True:
            for entry in page.entries:
                yield from self._read_entry(resource_type, entry, times)
            if page.next_link is None:
                yield from times.finish()
                return
            url = self._client.resolve(page.next_link, page.url)
            if hash(url) in links:
                raise NotFhir(f"the next links of {what} form a loop: the server's paging is broken")
            links.add(hash(url))
            self._client.limits.check_pages(len(links) + 1, what)
            try:
                page = self._client.get(url, _parse_page)
            except HttpStatusError as error:
                if error.status in (404, 410):
                    raise PageExpired from None
                raise

    def _read_entry(self, resource_type: str, entry: HistoryEntry, times: DeletionTimes) -> Iterator[Deletion]:
        target = entry.target
        if not entry.is_deletion:
            return times.add_version(target, entry.moment)
        if target is None or target.resource_type != resource_type:
            self._client.notices.add(
                "error",
                "unreadable-deletion",
                f"the history of {resource_type} has deletions that do not name a {resource_type} by its id; they are "
                "not applied: see the server's log, and load with --full-refresh to remove what it deleted",
                resource_type,
            )
            return iter(())
        return times.add_deletion(target, entry.moment)


def _parse_page(response: FhirResponse) -> _HistoryPage:
    try:
        bundle = _decode(mask_half_surrogates(response.body))
    except msgspec.ValidationError as error:
        raise NotFhir(f"the server answered a history with JSON that is not a Bundle: {error}") from None
    except RecursionError:
        raise NotFhir("the server answered a history with JSON that is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise invalid_json_failure(response) from None
    if bundle.resource_type != "Bundle" or bundle.type not in ("history", None):
        raise NotFhir("the server answered a history with something other than a Bundle of type history")
    links = bundle.link or []
    next_link = next((link.url for link in links if link.relation == "next" and link.url), None)
    return _HistoryPage(response.url, [entry for entry in bundle.entry or () if entry], next_link, response.date)
