"""Routes of liveness, readiness and metrics. The health routes need no token and return booleans only."""

from asyncio import create_task, shield, to_thread
from collections.abc import Callable
from copy import copy

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from fhir_assets.api.context import AppContext, Context
from fhir_assets.api.problems import problem_responses
from fhir_assets.errors import FhirAssetsError
from fhir_assets.warehouse.postgres.db.connections import is_alive

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """Readiness: `ready` if the database, the store, the landing zone and Dagster are available; `live` is always true.

    `landing` is true without a landing zone.
    """

    live: bool = True
    ready: bool
    database: bool
    store: bool
    landing: bool
    dagster: bool


class Live(BaseModel):
    """Liveness: the process answers requests."""

    live: bool = True


@router.get("/health/live", response_model=Live, summary="Liveness")
async def live() -> Response:
    """For a liveness probe. It does not contact the database, the store or Dagster."""
    return Response(b'{"live":true}', media_type="application/json")


@router.get(
    "/health",
    response_model=Health,
    responses={503: {"model": Health, "description": "Not ready"}},
    summary="Readiness",
)
async def health(context: Context) -> Response:
    """The status is 503 while the database, the store, the landing zone or Dagster is not available."""
    return await _check_once(context)


@router.get(
    "/health/ready",
    response_model=Health,
    responses={503: {"model": Health, "description": "Not ready"}},
    summary="Readiness",
)
async def ready(context: Context) -> Response:
    """The same answer as `/health`, for a readiness probe."""
    return await _check_once(context)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={**problem_responses(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Metrics for Prometheus",
)
def metrics(context: Context) -> Response:
    """Metrics of loads, dead letters, the outbox and checks, read from the database. Prometheus sends a token of role
    `operator` (`authorization` in its configuration).
    """
    content, content_type = context.render_metrics()
    return Response(content, media_type=content_type)


async def _check_once(context: AppContext) -> Response:
    """Return the answer of the check in progress, or of a new one.

    These requests need no token: many of them at once cost one thread and one connection.
    """
    if context.health_check is None:
        context.health_check = create_task(to_thread(_health, context))
        context.health_check.add_done_callback(lambda _: setattr(context, "health_check", None))
    return copy(await shield(context.health_check))


def _health(context: AppContext) -> Response:
    def database() -> bool:
        with context.connection() as conn:
            return is_alive(conn)

    def store() -> bool:
        # Parts can be written to the temporary folder, and blobs can be read.
        context.store.blobs.spool()
        context.store.blobs.get("health")
        return True

    def landing() -> bool:
        if context.settings.fhir_landing_url:
            next(iter(context.zone.files()), None)
        return True

    available = {
        "database": _passes(database),
        "store": _passes(store),
        "landing": _passes(landing),
        "dagster": _passes(context.dagster.is_ready),
    }
    ready = all(available.values())
    return Response(
        orjson.dumps({"live": True, "ready": ready, **available}), 200 if ready else 503, media_type="application/json"
    )


def _passes(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except FhirAssetsError:
        return False
