"""HTTP routes of the FHIR interactions (https://hl7.org/fhir/R4/http.html)."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import partial
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response

from fhir_assets.sandbox.batch import run_bundle
from fhir_assets.sandbox.capability import build_capability_statement
from fhir_assets.sandbox.dates import from_microseconds, parse_date
from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.interactions import InteractionResult, Interactions
from fhir_assets.sandbox.memory import Version
from fhir_assets.sandbox.outcomes import Refusal
from fhir_assets.sandbox.search import (
    MAX_COUNT,
    Listing,
    Pages,
    Query,
    build_expired_refusal,
    build_unknown_parameters_outcome,
    find_matches,
    find_patients,
    parse_search,
    render_page,
)

FHIR_JSON = "application/fhir+json"


def build_fhir_routes(interactions: Interactions, pages: Pages) -> APIRouter:
    """Return the routes of a FHIR server."""
    routes = APIRouter()
    store = interactions.store
    started = datetime.now(UTC).isoformat(timespec="seconds")

    def first_page(request: Request, listing: Listing) -> Response:
        return _fhir_response(render_page(_base_url(request), listing, 0, pages, _drawn_faults(request)))

    def search(request: Request, resource_type: str, query: Query, self_link: str) -> Response:
        interactions.require_type(resource_type)
        parsed = parse_search(resource_type, query, strict="handling=strict" in request.headers.get("prefer", ""))
        versions = find_matches(store, resource_type, parsed)
        outcome = build_unknown_parameters_outcome(parsed.unknown) if parsed.unknown else None
        total = len(versions) if parsed.total or parsed.only_count else None
        listed = [] if parsed.only_count else versions
        listing = Listing("searchset", self_link, listed, max(parsed.count, 1), total, outcome)
        if parsed.include_patients:
            listing = replace(listing, include=partial(find_patients, store))
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

    def list_versions(resource_types: Sequence[str]) -> list[Version]:
        versions = [
            version
            for name in resource_types
            for latest in store.type_store(name).latest.values()
            for version in latest.history()
        ]
        versions.sort(key=lambda version: version.when, reverse=True)
        return versions

    @routes.get("/metadata")
    async def metadata(request: Request) -> Response:
        return _fhir_response(build_capability_statement(_base_url(request), interactions.types(), started))

    @routes.get("")
    @routes.get("/")
    async def next_page(request: Request) -> Response:
        token = request.query_params.get("_page")
        if token is None:
            raise Refusal(400, "not-supported", "This server searches one resource type at a time")
        drawn = _drawn_faults(request)
        if FaultKind.EXPIRE in drawn:
            pages.expire(token)
            raise build_expired_refusal(drawn[FaultKind.EXPIRE].answer_status)
        listing, offset = pages.get(token)
        return _fhir_response(render_page(_base_url(request), listing, offset, pages, drawn))

    @routes.post("")
    @routes.post("/")
    async def bundle(request: Request) -> Response:
        def page(listing: Listing) -> bytes:
            return render_page(_base_url(request), listing, 0, pages, {})

        return _fhir_response(run_bundle(interactions, await request.body(), page))

    @routes.get("/_history")
    async def system_history(request: Request) -> Response:
        return history(request, list_versions(list(store.type_stores)))

    @routes.get("/{resource_type}/_history")
    async def type_history(request: Request, resource_type: str) -> Response:
        interactions.require_type(resource_type)
        return history(request, list_versions([resource_type]))

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
        return _version_response(200, interactions.version(resource_type, resource_id, version_id))

    @routes.get("/{resource_type}/{resource_id}")
    async def read(request: Request, resource_type: str, resource_id: str) -> Response:
        version = interactions.latest(resource_type, resource_id)
        if request.headers.get("if-none-match") == _etag(version):
            return Response(status_code=304, headers={"ETag": _etag(version)})
        return _version_response(200, version)

    @routes.post("/{resource_type}")
    async def create(request: Request, resource_type: str) -> Response:
        condition = request.headers.get("if-none-exist")
        return _result_response(request, interactions.create(resource_type, await request.body(), condition))

    @routes.put("/{resource_type}")
    async def update_matching(request: Request, resource_type: str) -> Response:
        body = await request.body()
        return _result_response(request, interactions.update_matching(resource_type, request.url.query, body))

    @routes.put("/{resource_type}/{resource_id}")
    async def update(request: Request, resource_type: str, resource_id: str) -> Response:
        if_match = request.headers.get("if-match")
        body = await request.body()
        return _result_response(request, interactions.update(resource_type, resource_id, body, if_match))

    @routes.delete("/{resource_type}")
    async def delete_matching(request: Request, resource_type: str) -> Response:
        return _result_response(request, interactions.delete_matching(resource_type, request.url.query))

    @routes.delete("/{resource_type}/{resource_id}")
    async def delete(request: Request, resource_type: str, resource_id: str) -> Response:
        if_match = request.headers.get("if-match")
        return _result_response(request, interactions.delete(resource_type, resource_id, if_match))

    return routes


def _base_url(request: Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc}/fhir"


def _drawn_faults(request: Request) -> dict[FaultKind, Fault]:
    drawn: dict[FaultKind, Fault] = request.state.faults
    return drawn


def _instant(text: str) -> int:
    try:
        return parse_date(text).start
    except ValueError:
        raise Refusal(400, "invalid", "_since is not a FHIR instant") from None


def _fhir_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers=headers, media_type=FHIR_JSON)


def _etag(version: Version) -> str:
    return f'W/"{version.version_id}"'


def _version_response(status: int, version: Version, location: str | None = None) -> Response:
    headers = {
        "ETag": _etag(version),
        "Last-Modified": format_datetime(from_microseconds(version.when), usegmt=True),
    }
    if location:
        headers["Location"] = location
    return _fhir_response(version.body, status, headers) if version.body else Response(status_code=204, headers=headers)


def _result_response(request: Request, result: InteractionResult) -> Response:
    version = result.version
    if version is None or result.status == 204:
        headers = {} if version is None else {"ETag": _etag(version)}
        return Response(status_code=204, headers=headers)
    path = f"{version.resource_type}/{version.id}/_history/{version.version_id}"
    return _version_response(result.status, version, f"{_base_url(request)}/{path}")
