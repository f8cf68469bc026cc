"""Bulk Data Access (https://hl7.org/fhir/uv/bulkdata/STU2/): ``$export`` at all three levels, asynchronous.

An export is a snapshot at the time of its kick-off. It is complete only after a few polls, so that clients must wait.
"""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import parse_qsl, unquote

import orjson
from fastapi import APIRouter, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fhir_assets.catalog import BY_NAME
from fhir_assets.sandbox.dates import parse_date
from fhir_assets.sandbox.fault_injection import Control
from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.interactions import Interactions
from fhir_assets.sandbox.memory import Version
from fhir_assets.sandbox.outcomes import Refusal, build_operation_outcome
from fhir_assets.sandbox.search import find_matches, parse_search

EXPORT = "_export"
"""The path below the FHIR base of the status and the files of exports."""

_NDJSON = "application/fhir+ndjson"


@dataclass(slots=True)
class _File:
    resource_type: str
    lines: Sequence[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(line + b"\n" for line in self.lines)


@dataclass(slots=True)
class _Export:
    request: str
    at: datetime
    polls: int
    output: list[_File] = field(default_factory=list)
    deleted: list[_File] = field(default_factory=list)
    errors: list[_File] = field(default_factory=list)

    def file(self, name: str) -> _File | None:
        """Return the file whose URL ends with ``name``, such as ``output-17.ndjson``."""
        kind, _, number = name.removesuffix(".ndjson").partition("-")
        files = {"output": self.output, "deleted": self.deleted, "error": self.errors}.get(kind, [])
        return files[int(number)] if number.isdigit() and int(number) < len(files) else None


class Exports:
    """The exports of a server by the token in their URLs."""

    def __init__(self) -> None:
        self.by_token: dict[str, _Export] = {}

    def get(self, token: str) -> _Export:
        """Return the export of a token. Raises Refusal if there is none."""
        if token not in self.by_token:
            raise Refusal(404, "not-found", "There is no such export")
        return self.by_token[token]


class ExportFiles:
    """ASGI middleware that serves the files of exports without the overhead of FastAPI.

    Clients request thousands of small files, and a benchmark of a client needs a server that is faster than the client.
    """

    def __init__(self, app: ASGIApp, *, base: str, exports: Exports) -> None:
        self._app = app
        self._prefix = f"{base}/{EXPORT}/"
        self._exports = exports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        path = str(scope.get("path", ""))
        if scope["type"] == "http" and path.startswith(self._prefix) and scope["method"] == "GET":
            token, _, name = path[len(self._prefix) :].partition("/")
            export = self._exports.by_token.get(token)
            file = export.file(name) if export else None
            if file is not None and FaultKind.EXPIRE not in scope["state"]["faults"]:
                body = file.body
                headers = [(b"content-length", str(len(body)).encode()), (b"content-type", _NDJSON.encode())]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
        await self._app(scope, receive, send)


def build_bulk_routes(
    interactions: Interactions,
    control: Control,
    exports: Exports,
    *,
    polls: int,
    file_resources: int,
    needs_token: bool,
) -> APIRouter:
    """Return the routes of ``$export``.

    An export is complete after ``polls`` polls. Each of its files contains up to ``file_resources`` resources and is
    served by ExportFiles.
    """
    routes = APIRouter()
    store = interactions.store

    def kick_off(request: Request, level: str, patients: frozenset[str] | None) -> Response:
        if "respond-async" not in request.headers.get("prefer", ""):
            raise Refusal(400, "invalid", "An export must be requested with Prefer: respond-async")
        query = dict(parse_qsl(request.url.query, keep_blank_values=True))
        if len(query) != len(parse_qsl(request.url.query, keep_blank_values=True)):
            raise Refusal(400, "invalid", "A parameter is given twice: join its values with commas")
        since = _parse_since(query.get("_since"))
        requested_types = query["_type"].split(",") if query.get("_type") else interactions.types()
        types = [name for name in requested_types if interactions.offers(name)]
        now = datetime.now(UTC)
        export = _Export(str(request.url), now, polls)
        filters = _parse_filters(query.get("_typeFilter", ""))
        for name in types:
            if level != "system" and not (name == "Patient" or (name in BY_NAME and BY_NAME[name].patient)):
                continue
            bodies = [version.body for version in _select_versions(name, since, patients, filters.get(name, []))]
            export.output += [_File(name, chunk) for chunk in _split(bodies, file_resources)]
            deleted_versions = [
                v for v in store.type_store(name).latest.values() if since is not None and v.deleted and v.when >= since
            ]
            if deleted_versions:
                export.deleted.append(_File("Bundle", [_build_deletion(version) for version in deleted_versions]))
        if unknown := [name for name in requested_types if name not in types]:
            outcome = build_operation_outcome("error", "not-supported", f"No such types here: {', '.join(unknown)}")
            export.errors.append(_File("OperationOutcome", [orjson.dumps(outcome)]))
        token = secrets.token_hex(8)
        exports.by_token[token] = export
        control.stats.kick_offs += 1
        return Response(status_code=202, headers={"Content-Location": f"{_base_url(request)}/{EXPORT}/{token}"})

    def _select_versions(
        name: str, since: int | None, patients: frozenset[str] | None, filters: Sequence[str]
    ) -> Iterable[Version]:
        if filters:
            by_id: dict[str, Version] = {}
            for search in filters:
                query = parse_qsl(search, keep_blank_values=True)
                by_id |= {v.id: v for v in find_matches(store, name, parse_search(name, query, strict=False))}
            versions: Iterable[Version] = by_id.values()
        else:
            versions = store.type_store(name).latest.values()
        for version in versions:
            is_recent = since is None or version.when >= since
            if version.body and is_recent and (patients is None or _is_in_compartment(version, patients)):
                yield version

    @routes.get("/$export")
    async def system(request: Request) -> Response:
        return kick_off(request, "system", None)

    @routes.get("/Patient/$export")
    async def patients(request: Request) -> Response:
        return kick_off(request, "patient", None)

    @routes.get("/Group/{group_id}/$export")
    async def group(request: Request, group_id: str) -> Response:
        version = store.latest("Group", group_id)
        if version is None or version.deleted:
            raise Refusal(404, "not-found", "There is no such Group")
        members = orjson.loads(version.body).get("member", [])
        return kick_off(request, "group", frozenset(m["entity"]["reference"].rpartition("/")[2] for m in members))

    @routes.get(f"/{EXPORT}/{{token}}")
    async def status(request: Request, token: str) -> Response:
        export = exports.get(token)
        faults: dict[FaultKind, Fault] = request.state.faults
        if FaultKind.EXPIRE in faults:
            del exports.by_token[token]
            raise Refusal(faults[FaultKind.EXPIRE].answer_status, "not-found", "The export is gone")
        if export.polls > 0:
            export.polls -= 1
            progress = f"{100 * (polls - export.polls) // (polls + 1)} % done"
            return Response(status_code=202, headers={"X-Progress": progress, "Retry-After": "0"})
        count_error = faults[FaultKind.WRONG_TOTAL].by if FaultKind.WRONG_TOTAL in faults else 0

        def describe_files(kind: str, files: Sequence[_File]) -> list[dict[str, object]]:
            url = f"{_base_url(request)}/{EXPORT}/{token}/{kind}"
            return [
                {
                    "type": f.resource_type,
                    "url": f"{url}-{n}.ndjson",
                    "count": len(f.lines) + (count_error if n == 0 else 0),
                }
                for n, f in enumerate(files)
            ]

        manifest = {
            "transactionTime": export.at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "request": export.request,
            "requiresAccessToken": needs_token,
            "output": describe_files("output", export.output),
            "deleted": describe_files("deleted", export.deleted),
            "error": describe_files("error", export.errors),
        }
        if FaultKind.MALFORMED in faults:
            del manifest["transactionTime"]
        return Response(orjson.dumps(manifest), media_type="application/json")

    @routes.delete(f"/{EXPORT}/{{token}}")
    async def forget(token: str) -> Response:
        exports.get(token)
        del exports.by_token[token]
        return Response(status_code=202)

    @routes.get(f"/{EXPORT}/{{token}}/{{name}}")
    async def no_file(request: Request, token: str, name: str) -> Response:
        exports.get(token)
        faults: dict[FaultKind, Fault] = request.state.faults
        status = faults[FaultKind.EXPIRE].answer_status if FaultKind.EXPIRE in faults else 404
        raise Refusal(status, "not-found", "No such file")

    return routes


def _base_url(request: Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc}/fhir"


def _parse_since(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_date(text).start
    except ValueError:
        raise Refusal(400, "invalid", "_since is not a FHIR instant") from None


def _parse_filters(text: str) -> dict[str, list[str]]:
    """Return the searches of ``_typeFilter`` by resource type. Commas inside a search are given as %2C."""
    queries: dict[str, list[str]] = {}
    for search in filter(None, text.split(",")):
        name, _, query = unquote(search).partition("?")
        queries.setdefault(name, []).append(query)
    return queries


def _is_in_compartment(version: Version, patients: frozenset[str]) -> bool:
    """Return whether a resource is in the compartment of one of ``patients``."""
    if version.resource_type == "Patient":
        return version.id in patients
    resource = orjson.loads(version.body)
    for path in BY_NAME[version.resource_type].patient:
        for reference in _find_references(resource, path.split(".")):
            kind, _, resource_id = reference.rpartition("/")
            if kind.endswith("Patient") and resource_id in patients:
                return True
    return False


def _find_references(node: object, path: Sequence[str]) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _find_references(item, path)
    elif isinstance(node, dict):
        if path:
            yield from _find_references(node.get(path[0]), path[1:])
        elif isinstance(reference := node.get("reference"), str):
            yield reference


def _build_deletion(version: Version) -> bytes:
    entry = {"request": {"method": "DELETE", "url": f"{version.resource_type}/{version.id}"}}
    when = datetime.fromtimestamp(version.when / 1e6, UTC).isoformat()
    meta = {"lastUpdated": when}
    return orjson.dumps({"resourceType": "Bundle", "type": "transaction", "meta": meta, "entry": [entry]})


def _split(lines: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(lines), size):
        yield lines[start : start + size]
