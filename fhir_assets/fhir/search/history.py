"""What a server deleted, out of the history of a type (https://hl7.org/fhir/R4/http.html#history)."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import msgspec

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir.client.http import FhirClient, FhirResponse, HttpStatusError, Params, invalid_json_failure
from fhir_assets.fhir.record import Deletion, parse_instant

_RESTARTS = 3


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
class _Page:
    url: str
    bundle: _Bundle
    date: datetime | None


class DeletionHistory:
    """The deletions in a server's history. Versions that are not deletions are passed over: search gives those."""

    def __init__(self, client: FhirClient, *, page_size: int = 500) -> None:
        self._client = client
        self._page_size = page_size
        self.asked_at: datetime | None = None
        """When the last asking began, by the server's own clock; None if it does not say."""

    def offered(self) -> frozenset[str] | None:
        """The types that have a history, as the server says; None if it does not say."""
        return self._client.capabilities().offers("history-type")

    def fetch_since(self, resource_type: str, moment: datetime) -> Iterator[Deletion]:
        """The deletions of a type since ``moment``, newest first; some twice if the server forgot its pages meanwhile.

        Raises NotFhir for a deletion that does not say of what, or when; ServerUnavailable, ServerRefused.
        """
        since = moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        params = [("_since", since), ("_count", str(self._page_size))]
        for _ in range(_RESTARTS):
            try:
                yield from self._read(resource_type, params)
                return
            except _Expired:
                continue
        raise ServerUnavailable(
            f"the pages of the history of {resource_type} expire before they can be read, even after {_RESTARTS} "
            "attempts: lower FHIR_PAGE_SIZE, or let the server keep its pages longer"
        )

    def _read(self, resource_type: str, params: Params) -> Iterator[Deletion]:
        page = self._client.get(f"{resource_type}/_history", _read_page, params=params)
        self.asked_at = page.date
        links = set()
        while True:
            for entry in page.bundle.entry:
                if entry.request is not None and entry.request.method == "DELETE":
                    yield self._deletion(resource_type, entry)
            link = next((each.url for each in page.bundle.link if each.relation == "next" and each.url), None)
            if link is None:
                return
            url = self._client.resolve(link, page.url)
            if url in links:
                raise NotFhir(f"the pages of the history of {resource_type} run in a circle: the paging is broken")
            links.add(url)
            try:
                page = self._client.get(url, _read_page)
            except HttpStatusError as refusal:
                if refusal.status in (404, 410):
                    raise _Expired from None
                raise

    def _deletion(self, resource_type: str, entry: _Entry) -> Deletion:
        assert entry.request
        identity = _id_in(entry.request.url, resource_type) or _id_in(entry.fullUrl, resource_type)
        at = parse_instant(entry.response.lastModified) if entry.response else None
        if identity is None or at is None:
            lacking = "of what" if identity is None else "when (response.lastModified)"
            raise NotFhir(
                f"{self._client.base_url}/{resource_type}/_history holds a deletion that does not say {lacking}: "
                "set FHIR_DELETES=off, and load deletes from an export"
            )
        etag = (entry.response.etag or "") if entry.response else ""
        return Deletion(resource_type, identity, at, etag.removeprefix("W/").strip('"') or None)


class _Expired(Exception):
    """A next link is gone."""


def _read_page(answer: FhirResponse) -> _Page:
    try:
        bundle = _decode(answer.body)
    except msgspec.ValidationError as error:
        raise NotFhir(f"the server answered a history with JSON that is no Bundle: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise invalid_json_failure(answer) from None
    if bundle.type != "history":
        raise NotFhir("the server answered a history with something else than a Bundle of type history")
    return _Page(answer.url, bundle, answer.date)


def _id_in(url: str, resource_type: str) -> str | None:
    """The id in ``[base/]<type>/<id>[/_history/<version>]``."""
    parts = url.split("?")[0].split("/")
    after = [following for part, following in pairwise(parts) if part == resource_type]
    return after[-1] if after and after[-1] else None
