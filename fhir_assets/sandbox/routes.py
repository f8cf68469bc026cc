"""HTTP routes of the FHIR interactions (https://hl7.org/fhir/R4/http.html)."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import partial
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response

from fhir_assets.sandbox.batch import run_bundle
from fhir_assets.sandbox.capability import capability_statement
from fhir_assets.sandbox.dates import from_microseconds, parse_date
from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.interactions import Done, Interactions
from fhir_assets.sandbox.memory import Version
from fhir_assets.sandbox.outcomes import Refusal
from fhir_assets.sandbox.search import (
    MAX_COUNT,
    Listing,
    Pages,
    Query,
    expired,
    matches,
    parse,
    patients_of,
    render,
    unknown_outcome,
)

FHIR_JSON = "application/fhir+json"


def fhir_routes(interactions: Interactions, pages: Pages) -> APIRouter:
    """Return the routes of a FHIR server."""
    routes = APIRouter()
    store = interactions.store
    started = datetime.now(UTC).isoformat(timespec="seconds")

    def first_page(request: Request, listing: Listing) -> Response:
        return _fhir(render(_base(request), listing, 0, pages, _faults(request)))

    def search(request: Request, resource_type: str, query: Query, self_link: str) -> Response:
        interactions.require(resource_type)
        wanted = parse(resource_type, query, strict="handling=strict" in request.headers.get("prefer", ""))
        found = matches(store, resource_type, wanted)
        outcome = unknown_outcome(wanted.unknown) if wanted.unknown else None
        total = len(found) if wanted.total or wanted.only_count else None
        shown = [] if wanted.only_count else found
        listing = Listing("searchset", self_link, shown, max(wanted.count, 1), total, outcome)
        if wanted.include_patients:
            listing = replace(listing, include=partial(patients_of, store))
        return first_page(request, listing)

    def history(request: Request, versions: Sequence[Version]) -> Response:
        since, count = None, 50
        for name, value in request.query_params.multi_items():
            if name == "_since":
                since = _instant(value)
            elif name == "_count" and value.isdecimal():
                count = min(max(int(value), 1), MAX_COUNT)
        if since is not None:
            versions = [version for version in versions if version.when >= since]
        return first_page(request, Listing("history", str(request.url), versions, count, len(versions)))

    def versions_of(resource_types: Sequence[str]) -> list[Version]:
        found = [
            version
            for name in resource_types
            for latest in store.shelf(name).latest.values()
            for version in latest.history()
        ]
        found.sort(key=lambda version: version.when, reverse=True)
        return found

    @routes.get("/metadata")
    async def metadata(request: Request) -> Response:
        return _fhir(capability_statement(_base(request), interactions.types(), started))

    @routes.get("")
    @routes.get("/")
    async def next_page(request: Request) -> Response:
        token = request.query_params.get("_page")
        if token is None:
            raise Refusal(400, "not-supported", "This server searches one resource type at a time")
        drawn = _faults(request)
        if FaultKind.EXPIRE in drawn:
            pages.expire(token)
            raise expired(drawn[FaultKind.EXPIRE].answer_status)
        listing, offset = pages.at(token)
        return _fhir(render(_base(request), listing, offset, pages, drawn))

    @routes.post("")
    @routes.post("/")
    async def bundle(request: Request) -> Response:
        def page(listing: Listing) -> bytes:
            return render(_base(request), listing, 0, pages, {})

        return _fhir(run_bundle(interactions, await request.body(), page))

    @routes.get("/_history")
    async def system_history(request: Request) -> Response:
        return history(request, versions_of(list(store.shelves)))

    @routes.get("/{resource_type}/_history")
    async def type_history(request: Request, resource_type: str) -> Response:
        interactions.require(resource_type)
        return history(request, versions_of([resource_type]))

    @routes.get("/{resource_type}")
    async def search_by_get(request: Request, resource_type: str) -> Response:
        return search(request, resource_type, request.query_params.multi_items(), str(request.url))

    @routes.post("/{resource_type}/_search")
    async def search_by_post(request: Request, resource_type: str) -> Response:
        form = parse_qsl((await request.body()).decode(), keep_blank_values=True)
        query = [*request.query_params.multi_items(), *form]
        return search(request, resource_type, query, str(request.url).removesuffix("/_search"))

    @routes.get("/{resource_type}/{resource_id}/_history")
    async def instance_history(request: Request, resource_type: str, resource_id: str) -> Response:
        return history(request, interactions.history(resource_type, resource_id))

    @routes.get("/{resource_type}/{resource_id}/_history/{version_id}")
    async def vread(resource_type: str, resource_id: str, version_id: str) -> Response:
        return _versioned(200, interactions.version(resource_type, resource_id, version_id))

    @routes.get("/{resource_type}/{resource_id}")
    async def read(request: Request, resource_type: str, resource_id: str) -> Response:
        version = interactions.latest(resource_type, resource_id)
        if request.headers.get("if-none-match") == _etag(version):
            return Response(status_code=304, headers={"ETag": _etag(version)})
        return _versioned(200, version)

    @routes.post("/{resource_type}")
    async def create(request: Request, resource_type: str) -> Response:
        condition = request.headers.get("if-none-exist")
        return _done(request, interactions.create(resource_type, await request.body(), condition))

    @routes.put("/{resource_type}")
    async def update_where(request: Request, resource_type: str) -> Response:
        body = await request.body()
        return _done(request, interactions.update_where(resource_type, request.url.query, body))

    @routes.put("/{resource_type}/{resource_id}")
    async def update(request: Request, resource_type: str, resource_id: str) -> Response:
        if_match = request.headers.get("if-match")
        body = await request.body()
        return _done(request, interactions.update(resource_type, resource_id, body, if_match))

    @routes.delete("/{resource_type}")
    async def delete_where(request: Request, resource_type: str) -> Response:
        return _done(request, interactions.delete_where(resource_type, request.url.query))

    @routes.delete("/{resource_type}/{resource_id}")
    async def delete(request: Request, resource_type: str, resource_id: str) -> Response:
        return _done(request, interactions.delete(resource_type, resource_id))

    return routes


def _base(request: Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc}/fhir"


def _faults(request: Request) -> dict[FaultKind, Fault]:
    drawn: dict[FaultKind, Fault] = request.state.faults
    return drawn


def _instant(text: str) -> int:
    try:
        return parse_date(text).start
    except ValueError:
        raise Refusal(400, "invalid", "_since is not a FHIR instant") from None


def _fhir(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers=headers, media_type=FHIR_JSON)


def _etag(version: Version) -> str:
    return f'W/"{version.version_id}"'


def _versioned(status: int, version: Version, location: str | None = None) -> Response:
    headers = {
        "ETag": _etag(version),
        "Last-Modified": format_datetime(from_microseconds(version.when), usegmt=True),
    }
    if location:
        headers["Location"] = location
    return _fhir(version.body, status, headers) if version.body else Response(status_code=204, headers=headers)


def _done(request: Request, done: Done) -> Response:
    version = done.version
    if version is None or done.status == 204:
        headers = {} if version is None else {"ETag": _etag(version)}
        return Response(status_code=204, headers=headers)
    place = f"{version.resource_type}/{version.id}/_history/{version.version_id}"
    return _versioned(done.status, version, f"{_base(request)}/{place}")
