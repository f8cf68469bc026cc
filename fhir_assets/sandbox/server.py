"""The FastAPI app of the sandbox server: FHIR R4 under ``/fhir``, faults and statistics under ``/_sandbox``."""

import time
from typing import TypedDict, Unpack

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from fhir_assets.sandbox.bulk import ExportFiles, Exports, build_bulk_routes
from fhir_assets.sandbox.fault_injection import Control, Credentials, FaultInjection, Stats
from fhir_assets.sandbox.faults import FaultDraw, FaultPlan
from fhir_assets.sandbox.interactions import Interactions
from fhir_assets.sandbox.memory import Store
from fhir_assets.sandbox.outcomes import Refusal
from fhir_assets.sandbox.routes import FHIR_JSON, build_fhir_routes
from fhir_assets.sandbox.search import Pages
from fhir_assets.sandbox.smart import Smart, build_smart_routes

BASE = "/fhir"


class Options(TypedDict, total=False):
    """The options of a server. All are optional."""

    credentials: Credentials | None
    """The credentials that all requests below ``/fhir`` except ``/fhir/metadata`` must carry."""
    all_types: bool
    """Support all types of the catalog (the default), or only the types of stored resources."""
    referential_integrity: bool
    """Refuse a write with ``Type/id`` references to resources that do not exist."""
    page_lifetime: float
    """The lifetime of a next link in seconds; 600 by default."""
    export_polls: int
    """The number of polls until an export is complete; 2 by default."""
    export_file_resources: int
    """The maximum number of resources in a file of an export; 10,000 by default."""
    smart: Smart | None
    """The clients of SMART Backend Services, whose tokens replace ``credentials``."""


def create_app(
    store: Store,
    faults: FaultPlan | None = None,
    **options: Unpack[Options],
) -> FastAPI:
    """Return the app of a FHIR server on ``store``, with faults and options."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    control = Control(faults or FaultPlan())
    interactions = Interactions(
        store,
        all_types=options.get("all_types", True),
        referential_integrity=options.get("referential_integrity", False),
    )
    pages = Pages(time.monotonic, options.get("page_lifetime", 600))
    smart = options.get("smart")
    if smart is not None:
        app.include_router(build_smart_routes(smart, BASE))
    exports = Exports()
    bulk = build_bulk_routes(
        interactions,
        control,
        exports,
        polls=options.get("export_polls", 2),
        file_resources=options.get("export_file_resources", 10_000),
        needs_token=smart is not None or options.get("credentials") is not None,
    )
    app.include_router(bulk, prefix=BASE)
    app.include_router(build_fhir_routes(interactions, pages), prefix=BASE)
    app.include_router(_build_control_routes(control, store), prefix="/_sandbox")
    app.add_middleware(ExportFiles, base=BASE, exports=exports)
    app.add_middleware(
        FaultInjection,
        base=BASE,
        credentials=options.get("credentials"),
        control=control,
        admits=smart.admits if smart is not None else None,
    )

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        return Response(refusal.body, refusal.status, headers=refusal.headers, media_type=FHIR_JSON)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        code = "not-supported" if error.status_code == 405 else "not-found"
        return await refuse(request, Refusal(error.status_code, code, "This server has no such path or method"))

    return app


def _build_control_routes(control: Control, store: Store) -> APIRouter:
    routes = APIRouter()

    def json_response(value: object) -> Response:
        return Response(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS), media_type="application/json")

    def faults_response() -> Response:
        draw = control.faults
        return json_response({**draw.plan.model_dump(mode="json"), "struck": draw.struck})

    @routes.get("/faults")
    async def show_faults() -> Response:
        return faults_response()

    @routes.put("/faults")
    async def set_faults(request: Request) -> Response:
        try:
            plan = FaultPlan.model_validate_json(await request.body())
        except ValidationError as error:
            return Response(error.json(include_input=False), 422, media_type="application/json")
        control.faults = FaultDraw(plan)
        return faults_response()

    @routes.delete("/faults")
    async def delete_faults() -> Response:
        control.faults = FaultDraw(FaultPlan())
        return faults_response()

    @routes.get("/stats")
    async def show_stats() -> Response:
        stats = control.stats
        return json_response(
            {
                "requests": stats.requests,
                "statuses": stats.statuses,
                "struck": stats.struck,
                "max_in_flight": stats.max_in_flight,
                "kick_offs": stats.kick_offs,
                "recent": list(stats.recent),
                "resources": {name: type_store.count() for name, type_store in store.type_stores.items()},
            }
        )

    @routes.delete("/stats")
    async def reset_stats() -> Response:
        in_flight = control.stats.in_flight
        control.stats = Stats(in_flight=in_flight)
        return await show_stats()

    return routes
