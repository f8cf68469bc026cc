"""Bundles of type batch and transaction (https://hl7.org/fhir/R4/http.html#transaction)."""

import uuid
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

import msgspec
import orjson

from fhir_assets.sandbox.dates import instant
from fhir_assets.sandbox.interactions import Done, Interactions
from fhir_assets.sandbox.memory import Version
from fhir_assets.sandbox.outcomes import Refusal
from fhir_assets.sandbox.search import Listing, matches, parse

Page = Callable[[Listing], bytes]


class _Request(msgspec.Struct):
    method: str
    url: str
    ifMatch: str | None = None  # noqa: N815
    ifNoneExist: str | None = None  # noqa: N815


class _Entry(msgspec.Struct):
    request: _Request | None = None
    resource: msgspec.Raw = msgspec.Raw(b"")
    fullUrl: str | None = None  # noqa: N815


class _Bundle(msgspec.Struct):
    resourceType: str  # noqa: N815
    type: str
    entry: list[_Entry] = []


_bundle = msgspec.json.Decoder(_Bundle)
_TRANSACTION_ORDER = {"DELETE": 0, "POST": 1, "PUT": 2, "GET": 3, "HEAD": 3}


def run_bundle(interactions: Interactions, body: bytes, page: Page) -> bytes:
    """Execute a batch or transaction and return the Bundle of its responses, in the same order.

    ``page`` renders the first page of a search. Raises Refusal if the body is not a batch or transaction, and for a
    transaction with a refused entry, which then changes nothing.
    """
    try:
        bundle = _bundle.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refusal(400, "structure", "The body is not a Bundle in JSON") from None
    if bundle.resourceType != "Bundle" or bundle.type not in ("batch", "transaction"):
        raise Refusal(400, "value", "Only a Bundle of type batch or transaction can be posted here")
    answers = (_batch if bundle.type == "batch" else _transaction)(interactions, bundle.entry, page)
    return b'{"resourceType":"Bundle","type":"%b-response","entry":[%b]}' % (
        bundle.type.encode(),
        b",".join(answers),
    )


def _batch(interactions: Interactions, entries: list[_Entry], page: Page) -> list[bytes]:
    answers = []
    for entry in entries:
        try:
            answers.append(_run(interactions, entry, bytes(entry.resource), page)[0])
        except Refusal as refusal:
            answers.append(_refused(refusal))
    return answers


def _transaction(interactions: Interactions, entries: list[_Entry], page: Page) -> list[bytes]:
    texts, ids = _resolved(entries)
    answers = [b""] * len(entries)
    written: list[Version] = []

    def rank(n: int) -> int:
        request = entries[n].request
        return _TRANSACTION_ORDER.get(request.method, 9) if request else 9

    try:
        for n in sorted(range(len(entries)), key=rank):
            answers[n], done = _run(interactions, entries[n], texts[n], page, ids.get(n))
            if done is not None and done.version is not None:
                written.append(done.version)
    except Refusal as refusal:
        for version in reversed(written):
            interactions.store.shelf(version.resource_type).undo(version)
        status = 400 if refusal.status == 404 else refusal.status
        raise Refusal(status, "processing", f"The transaction was taken back: {refusal}") from None
    return answers


def _resolved(entries: list[_Entry]) -> tuple[list[bytes], dict[int, str]]:
    """Return the resources with ``urn:uuid:`` references replaced by the ids that POSTed entries will get."""
    texts = [bytes(entry.resource) for entry in entries]
    ids: dict[int, str] = {}
    for n, entry in enumerate(entries):
        if entry.fullUrl and entry.fullUrl.startswith("urn:uuid:") and entry.request:
            url = entry.request.url
            if entry.request.method == "POST":
                ids[n] = str(uuid.uuid4())
                url = f"{url}/{ids[n]}"
            texts = [text.replace(orjson.dumps(entry.fullUrl), orjson.dumps(url)) for text in texts]
    return texts, ids


def _run(
    interactions: Interactions, entry: _Entry, text: bytes, page: Page, new_id: str | None = None
) -> tuple[bytes, Done | None]:
    """Execute one entry. Returns its response and the version that it wrote."""
    if entry.request is None:
        raise Refusal(400, "required", "The entry has no request")
    method, url = entry.request.method, urlsplit(entry.request.url)
    resource_type, _, resource_id = url.path.strip("/").partition("/")
    match method:
        case "GET" if resource_id:
            version = interactions.latest(resource_type, resource_id)
            return _answer(Done(200, version), version.body), None
        case "GET":
            interactions.require(resource_type)
            search = parse(resource_type, parse_qsl(url.query, keep_blank_values=True), strict=False)
            found = matches(interactions.store, resource_type, search)
            shown = [] if search.only_count else found
            listing = Listing("searchset", entry.request.url, shown, max(search.count, 1), len(found))
            return b'{"resource":%b,"response":{"status":"200 OK"}}' % page(listing), None
        case "PUT" if resource_id:
            done = interactions.update(resource_type, resource_id, text, entry.request.ifMatch)
        case "PUT":
            done = interactions.update_where(resource_type, url.query, text)
        case "POST" if not resource_id:
            done = interactions.create(resource_type, text, entry.request.ifNoneExist, new_id)
            if done.status == 200:
                return _answer(done), None
        case "DELETE" if resource_id:
            done = interactions.delete(resource_type, resource_id)
        case "DELETE":
            done = interactions.delete_where(resource_type, url.query)
        case _:
            raise Refusal(400, "not-supported", "The entry asks for an interaction that this server lacks")
    return _answer(done), done if done.changed else None


def _answer(done: Done, resource: bytes | None = None) -> bytes:
    response = {"status": f"{done.status} {HTTPStatus(done.status).phrase}"}
    if (version := done.version) is not None:
        response["location"] = f"{version.resource_type}/{version.id}/_history/{version.version_id}"
        response["etag"] = f'W/"{version.version_id}"'
        response["lastModified"] = instant(version.when)
    head = b"" if resource is None else b'"resource":%b,' % resource
    return b'{%b"response":%b}' % (head, orjson.dumps(response))


def _refused(refusal: Refusal) -> bytes:
    status = f"{refusal.status} {HTTPStatus(refusal.status).phrase}"
    return orjson.dumps({"response": {"status": status, "outcome": refusal.outcome}})
