"""One page of a search: a Bundle of type searchset, whose resources keep the bytes that the server sent.

See https://hl7.org/fhir/R4/search.html#return. The envelope is read leniently, because servers write ``null`` for an
empty list, write a total as text, or omit the Bundle's type. Resources are not changed.
"""

from dataclasses import dataclass
from datetime import datetime

import msgspec

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.client.response import FhirResponse, invalid_json_failure
from fhir_assets.fhir.half_surrogates import mask_half_surrogates, unmask


class Link(msgspec.Struct):
    """A link of a Bundle."""

    relation: str = ""
    url: str = ""


class _Search(msgspec.Struct):
    mode: str | None = None


class SearchEntry(msgspec.Struct):
    """An entry of a page. ``resource`` is empty if the entry has none."""

    resource: msgspec.Raw = msgspec.Raw()
    search: _Search | None = None

    @property
    def mode(self) -> str | None:
        """``match``, ``include`` or ``outcome``; None if the entry has no search mode."""
        return self.search.mode if self.search else None


class _Bundle(msgspec.Struct, rename="camel"):
    resource_type: str = ""
    type: str | None = None
    total: int | None = None
    link: list[Link] | None = None
    entry: list[SearchEntry] | None = None


class _LenientLink(msgspec.Struct):
    relation: str | None = None
    url: str | None = None


class _LenientBundle(msgspec.Struct, rename="camel"):
    """A Bundle whose entries are decoded one by one, so that a malformed entry does not make the page unreadable."""

    resource_type: str = ""
    type: str | None = None
    total: msgspec.Raw = msgspec.Raw()
    link: list[_LenientLink | None] | _LenientLink | None = None
    entry: list[msgspec.Raw] | None = None


_decoder = msgspec.json.Decoder(_Bundle)
_lenient_decoder = msgspec.json.Decoder(_LenientBundle)
_entry_decoder = msgspec.json.Decoder(SearchEntry)


@dataclass(frozen=True, slots=True)
class SearchPage:
    """A page of a search.

    ``url`` is the address of the page; ``next_link`` the URL of the next page as the server wrote it, None on the last
    page, and empty if the server names a next page without its address. ``total`` is None if the server gives none that
    can be read. ``date`` is the time of the server's clock.
    """

    url: str
    entries: list[SearchEntry | msgspec.Raw]
    """The entries in order. An entry that is not a valid Bundle entry is kept as ``msgspec.Raw``."""
    next_link: str | None
    total: int | None
    date: datetime | None


def parse_search_page(response: FhirResponse) -> SearchPage:
    """Parse a page of a search.

    Raises TransientFailure if the body is not complete JSON, and NotFhir if it is JSON but not a Bundle of type
    searchset. A Bundle without a type counts as a searchset.
    """
    try:
        bundle, entries, links = _decode(response.body)
    except msgspec.ValidationError as error:
        raise NotFhir(f"the server answered a search with JSON that is not a Bundle: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise invalid_json_failure(response) from None
    except RecursionError:
        raise NotFhir("the server answered a search with JSON that is nested too deeply to be read") from None
    if bundle.resource_type == "OperationOutcome":
        raise NotFhir("the server answered a search with an OperationOutcome: see the server's log")
    if bundle.resource_type != "Bundle" or (bundle.type or "searchset") != "searchset":
        raise NotFhir("the server answered a search with something other than a Bundle of type searchset")
    total = bundle.total if isinstance(bundle, _Bundle) else read_total(bundle.total)
    next_link = next((link.url for link in links if link.relation == "next"), None)
    return SearchPage(response.url, entries, next_link, None if total is None or total < 0 else total, response.date)


def _decode(body: bytes) -> tuple[_Bundle | _LenientBundle, list[SearchEntry | msgspec.Raw], list[Link]]:
    try:
        bundle = _decoder.decode(body)
    except msgspec.DecodeError:
        return _decode_leniently(body)
    return bundle, list(bundle.entry or ()), bundle.link or []


def _decode_leniently(body: bytes) -> tuple[_LenientBundle, list[SearchEntry | msgspec.Raw], list[Link]]:
    masked = mask_half_surrogates(body)
    bundle = _lenient_decoder.decode(masked)
    links = bundle.link if isinstance(bundle.link, list) else [bundle.link]
    return (
        bundle,
        [_decode_entry(entry) for entry in unmask(body, masked, bundle.entry or ())],
        [Link(link.relation or "", link.url or "") for link in links if link],
    )


def _decode_entry(body: bytes) -> SearchEntry | msgspec.Raw:
    masked = mask_half_surrogates(body)
    try:
        entry = _entry_decoder.decode(masked)
    except msgspec.DecodeError:
        return msgspec.Raw(body)
    [resource] = unmask(body, masked, [entry.resource])
    entry.resource = msgspec.Raw(resource)
    return entry


def read_total(raw: msgspec.Raw) -> int | None:
    """Return a total that is a number or a text of digits (``3``, ``3.0``, ``"3"``); None for anything else."""
    text = bytes(raw).decode(errors="replace").strip().strip('"').strip()
    try:
        number = float(text)
        return int(text) if text.isdigit() else int(number) if number.is_integer() else None
    except (ValueError, OverflowError):
        return None
