"""Bundles of type batch and transaction (https://hl7.org/fhir/R4/http.html#transaction)."""

import uuid
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

import msgspec
import orjson

from fhir_assets.sandbox.dates import instant
from fhir_assets.sandbox.interactions import InteractionResult, Interactions
from fhir_assets.sandbox.memory import Version
from fhir_assets.sandbox.outcomes import Refusal
from fhir_assets.sandbox.search import Listing, find_matches, parse_search

Page = Callable[[Listing], bytes]


class _Request(msgspec.Struct, rename="camel"):
    method: str
    url: str
    if_match: str | None = None
    if_none_exist: str | None = None


class _Entry(msgspec.Struct, rename="camel"):
    request: _Request | None = None
    resource: msgspec.Raw = msgspec.Raw(b"")
    full_url: str | None = None


class _Bundle(msgspec.Struct, rename="camel"):
    resource_type: str
    type: str
    entry: list[_Entry] = []


_bundle = msgspec.json.Decoder(_Bundle)
_TRANSACTION_ORDER = {"DELETE": 0, "POST": 1, "PUT": 2, "GET": 3, "HEAD": 3}


def run_bundle(interactions: Interactions, body: bytes, page: Page) -> bytes:
    """Execute a batch or transaction and return the Bundle of its responses, in the same order.

    ``page`` renders the first page of a search. Raises Refusal if the body is not a batch or transaction. If an entry
    of a transaction is refused, the transaction is rolled back and Refusal is raised.
    """
    try:
        bundle = _bundle.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refusal(400, "structure", "The body is not a Bundle in JSON") from None
    if bundle.resource_type != "Bundle" or bundle.type not in ("batch", "transaction"):
        raise Refusal(400, "value", "Only a Bundle of type batch or transaction can be posted here")
    responses = (_run_batch if bundle.type == "batch" else _run_transaction)(interactions, bundle.entry, page)
    return b'{"resourceType":"Bundle","type":"%b-response","entry":[%b]}' % (
        bundle.type.encode(),
        b",".join(responses),
    )


def _run_batch(interactions: Interactions, entries: list[_Entry], page: Page) -> list[bytes]:
    responses = []
    for entry in entries:
        try:
            responses.append(_execute(interactions, entry, bytes(entry.resource), page)[0])
        except Refusal as refusal:
            responses.append(_render_refusal(refusal))
    return responses


def _run_transaction(interactions: Interactions, entries: list[_Entry], page: Page) -> list[bytes]:
    texts, ids = _resolve_urn_references(entries)
    responses = [b""] * len(entries)
    written: list[Version] = []

    def rank(n: int) -> int:
        request = entries[n].request
        return _TRANSACTION_ORDER.get(request.method, 9) if request else 9

    try:
        for n in sorted(range(len(entries)), key=rank):
            responses[n], result = _execute(interactions, entries[n], texts[n], page, ids.get(n))
            if result is not None and result.version is not None:
                written.append(result.version)
    except Refusal as refusal:
        for version in reversed(written):
            interactions.store.type_store(version.resource_type).roll_back(version)
        status = 400 if refusal.status == 404 else refusal.status
        raise Refusal(status, "processing", f"The transaction was rolled back: {refusal}") from None
    return responses


def _resolve_urn_references(entries: list[_Entry]) -> tuple[list[bytes], dict[int, str]]:
    """Return the resources with ``urn:uuid:`` references replaced, and the new ids of the POSTed entries."""
    texts = [bytes(entry.resource) for entry in entries]
    ids: dict[int, str] = {}
    for n, entry in enumerate(entries):
        if entry.full_url and entry.full_url.startswith("urn:uuid:") and entry.request:
            url = entry.request.url
            if entry.request.method == "POST":
                ids[n] = str(uuid.uuid4())
                url = f"{url}/{ids[n]}"
            texts = [text.replace(orjson.dumps(entry.full_url), orjson.dumps(url)) for text in texts]
    return texts, ids


def _execute(
    interactions: Interactions, entry: _Entry, text: bytes, page: Page, new_id: str | None = None
) -> tuple[bytes, InteractionResult | None]:
    """Execute one entry. Return its response, and its result if it changed the store."""
    if entry.request is None:
        raise Refusal(400, "required", "The entry has no request")
    method, url = entry.request.method, urlsplit(entry.request.url)
    resource_type, _, resource_id = url.path.strip("/").partition("/")
    match method:
        case "GET" if resource_id:
            version = interactions.latest(resource_type, resource_id)
            return _render_response(InteractionResult(200, version), version.body), None
        case "GET":
            interactions.require_type(resource_type)
            search = parse_search(resource_type, parse_qsl(url.query, keep_blank_values=True), strict=False)
            versions = find_matches(interactions.store, resource_type, search)
            listed = [] if search.only_count else versions
            listing = Listing("searchset", entry.request.url, listed, max(search.count, 1), len(versions))
            return b'{"resource":%b,"response":{"status":"200 OK"}}' % page(listing), None
        case "PUT" if resource_id:
            result = interactions.update(resource_type, resource_id, text, entry.request.if_match)
        case "PUT":
            result = interactions.update_matching(resource_type, url.query, text)
        case "POST" if not resource_id:
            result = interactions.create(resource_type, text, entry.request.if_none_exist, new_id)
            if result.status == 200:
                return _render_response(result), None
        case "DELETE" if resource_id:
            result = interactions.delete(resource_type, resource_id, entry.request.if_match)
        case "DELETE":
            result = interactions.delete_matching(resource_type, url.query)
        case _:
            raise Refusal(400, "not-supported", "The entry requests an interaction that this server does not support")
    return _render_response(result), result if result.changed else None


def _render_response(result: InteractionResult, resource: bytes | None = None) -> bytes:
    response = {"status": f"{result.status} {HTTPStatus(result.status).phrase}"}
    if (version := result.version) is not None:
        response["location"] = f"{version.resource_type}/{version.id}/_history/{version.version_id}"
        response["etag"] = f'W/"{version.version_id}"'
        response["lastModified"] = instant(version.when)
    head = b"" if resource is None else b'"resource":%b,' % resource
    return b'{%b"response":%b}' % (head, orjson.dumps(response))


def _render_refusal(refusal: Refusal) -> bytes:
    status = f"{refusal.status} {HTTPStatus(refusal.status).phrase}"
    return orjson.dumps({"response": {"status": status, "outcome": refusal.outcome}})
