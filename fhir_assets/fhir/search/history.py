"""Deletions, read from the history of a resource type (https://hl7.org/fhir/R4/http.html#history)."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import msgspec

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir.client.http import FhirClient, Params
from fhir_assets.fhir.client.response import FhirResponse, HttpStatusError, invalid_json_failure
from fhir_assets.fhir.record import Deletion, parse_instant
from fhir_assets.fhir.search.pager import PageExpired

_ATTEMPTS = 3


class _Link(msgspec.Struct):
    relation: str = ""
    url: str = ""


class _Request(msgspec.Struct):
    method: str = ""
    url: str = ""


class _Response(msgspec.Struct):
    lastModified: str | None = None  # noqa: N815
    etag: str | None = None


class _Entry(msgspec.Struct):
    fullUrl: str = ""  # noqa: N815
    request: _Request | None = None
    response: _Response | None = None


class _Bundle(msgspec.Struct):
    type: str = ""
    link: list[_Link] = []
    entry: list[_Entry] = []


_decode = msgspec.json.Decoder(_Bundle).decode


@dataclass(frozen=True, slots=True)
class _HistoryPage:
    url: str
    bundle: _Bundle
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

    def fetch_since(self, resource_type: str, moment: datetime) -> Iterator[Deletion]:
        """Read the deletions of a type since ``moment``, newest first.

        A deletion is returned twice if the server's pages expire while they are read. Raises NotFhir for a deletion
        without an id or a time, and the errors of ``FhirClient.get``.
        """
        since = moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        params = [("_since", since), ("_count", str(self._page_size))]
        for _ in range(_ATTEMPTS):
            try:
                yield from self._read(resource_type, params)
                return
            except PageExpired:
                continue
        raise ServerUnavailable(
            f"the pages of the history of {resource_type} expire before they can be read, even after {_ATTEMPTS} "
            f"attempts: lower {self._client.labels.page_size}, or let the server keep its pages longer"
        )

    def _read(self, resource_type: str, params: Params) -> Iterator[Deletion]:
        page = self._client.get(f"{resource_type}/_history", _parse_page, params=params)
        self.requested_at = page.date
        links = set()
        while True:
            for entry in page.bundle.entry:
                if entry.request is not None and entry.request.method == "DELETE":
                    yield self._build_deletion(resource_type, entry)
            next_link = next((link.url for link in page.bundle.link if link.relation == "next" and link.url), None)
            if next_link is None:
                return
            url = self._client.resolve(next_link, page.url)
            if url in links:
                raise NotFhir(
                    f"the history of {resource_type} links its pages in a circle: the server's paging is broken"
                )
            links.add(url)
            try:
                page = self._client.get(url, _parse_page)
            except HttpStatusError as error:
                if error.status in (404, 410):
                    raise PageExpired from None
                raise

    def _build_deletion(self, resource_type: str, entry: _Entry) -> Deletion:
        assert entry.request
        resource_id = _find_id(entry.request.url, resource_type) or _find_id(entry.fullUrl, resource_type)
        deleted_at = parse_instant(entry.response.lastModified) if entry.response else None
        if resource_id is None or deleted_at is None:
            missing = "an id" if resource_id is None else "a time (response.lastModified)"
            raise NotFhir(
                f"{self._client.base_url}/{resource_type}/_history holds a deletion without {missing}: turn off "
                f"{self._client.labels.deletions}, and load deletions from an export"
            )
        etag = (entry.response.etag or "") if entry.response else ""
        return Deletion(resource_type, resource_id, deleted_at, etag.removeprefix("W/").strip('"') or None)


def _parse_page(response: FhirResponse) -> _HistoryPage:
    try:
        bundle = _decode(response.body)
    except msgspec.ValidationError as error:
        raise NotFhir(f"the server answered a history with JSON that is not a Bundle: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise invalid_json_failure(response) from None
    if bundle.type != "history":
        raise NotFhir("the server answered a history with something other than a Bundle of type history")
    return _HistoryPage(response.url, bundle, response.date)


def _find_id(url: str, resource_type: str) -> str | None:
    """Return the id in ``[base/]<type>/<id>[/_history/<version>]``."""
    parts = url.split("?")[0].split("/")
    after_type = [following for part, following in pairwise(parts) if part == resource_type]
    return after_type[-1] if after_type and after_type[-1] else None
