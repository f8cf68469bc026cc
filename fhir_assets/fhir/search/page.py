"""One page of a search: a Bundle of type searchset, each resource as the very bytes that came
(https://hl7.org/fhir/R4/search.html#return).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import msgspec

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.client.http import FhirResponse, invalid_json_failure


class _Link(msgspec.Struct):
    relation: str = ""
    url: str = ""


class _Search(msgspec.Struct):
    mode: str | None = None


class SearchEntry(msgspec.Struct):
    """An entry: ``resource`` is empty where there is none."""

    resource: msgspec.Raw = msgspec.Raw()
    search: _Search | None = None

    @property
    def mode(self) -> str | None:
        """``match``, ``include`` or ``outcome``; None if the server does not say."""
        return self.search.mode if self.search else None


class _Bundle(msgspec.Struct):
    resourceType: str = ""  # noqa: N815
    type: str = ""
    total: int | None = None
    link: list[_Link] = []
    entry: list[SearchEntry] = []


class _LooseBundle(msgspec.Struct):
    """As _Bundle, but each entry is decoded by itself, so that one odd entry does not spoil the page."""

    resourceType: str = ""  # noqa: N815
    type: str = ""
    total: int | None = None
    link: list[_Link] = []
    entry: list[msgspec.Raw] = []


_decoder = msgspec.json.Decoder(_Bundle)
_loose_decoder = msgspec.json.Decoder(_LooseBundle)
_entry_decoder = msgspec.json.Decoder(SearchEntry)


@dataclass(frozen=True, slots=True)
class SearchPage:
    """``url`` is where the page came from, ``next_link`` its link as it stands there; ``date`` the server's clock."""

    url: str
    entries: list[SearchEntry | msgspec.Raw]
    """An entry that has not the form of one stays Raw."""
    next_link: str | None
    total: int | None
    date: datetime | None


def parse_search_page(answer: FhirResponse) -> SearchPage:
    """Read a page. Raises PassingFailure for a body that is not whole JSON, NotFhir for any other content."""
    try:
        bundle, entries = _read(answer.body)
    except msgspec.ValidationError as error:
        raise NotFhir(f"the server answered a search with JSON that is no Bundle: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise invalid_json_failure(answer) from None
    except RecursionError:
        raise NotFhir("the server answered a search with JSON that is nested too deeply to be read") from None
    if bundle.resourceType == "OperationOutcome":
        raise NotFhir("the server answered a search with an OperationOutcome: its log says why")
    if bundle.resourceType != "Bundle" or bundle.type != "searchset":
        raise NotFhir("the server answered a search with something else than a Bundle of type searchset")
    following = next((link.url for link in bundle.link if link.relation == "next" and link.url), None)
    return SearchPage(answer.url, entries, following, bundle.total, answer.date)


def _read(body: bytes) -> tuple[_Bundle | _LooseBundle, list[SearchEntry | msgspec.Raw]]:
    try:
        bundle = _decoder.decode(body)
    except msgspec.ValidationError:
        loose = _loose_decoder.decode(body)
        return loose, list(_read_entries(loose.entry))
    return bundle, list(bundle.entry)


def _read_entries(entries: list[msgspec.Raw]) -> Iterator[SearchEntry | msgspec.Raw]:
    for raw in entries:
        try:
            yield _entry_decoder.decode(raw)
        except msgspec.ValidationError:
            yield raw
