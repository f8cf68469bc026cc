"""Whether the service lives, and whether what it needs is there. Needs no token, and tells no more than that."""

from collections.abc import Callable

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from fhir_assets.api.context import ContextOf
from fhir_assets.api.problems import answers
from fhir_assets.errors import FhirAssetsError

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """``live`` always, if it can be asked; ``ready`` if all parts are there."""

    live: bool = True
    ready: bool
    database: bool
    store: bool
    dagster: bool


class Live(BaseModel):
    """The process answers."""

    live: bool = True


@router.get("/health/live", response_model=Live, summary="Does the process answer?")
def live() -> Response:
    """For a liveness probe: it asks nobody else."""
    return Response(b'{"live":true}', media_type="application/json")


@router.get(
    "/health",
    response_model=Health,
    responses={503: {"model": Health, "description": "Not ready"}},
    summary="Is it ready?",
)
def health(context: ContextOf) -> Response:
    """503 while database, store or Dagster is missing."""
    return _health(context)


@router.get(
    "/health/ready",
    response_model=Health,
    responses={503: {"model": Health, "description": "Not ready"}},
    summary="Is it ready?",
)
def ready(context: ContextOf) -> Response:
    """The same, for a readiness probe."""
    return _health(context)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={**answers(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    summary="Metrics for Prometheus",
)
def metrics(context: ContextOf) -> Response:
    """What the database knows of loads, dead letters, the outbox and checks; Prometheus presents a token of role
    `operator` (`authorization` in its configuration).
    """
    content, content_type = context.metrics()
    return Response(content, media_type=content_type)


def _health(context: ContextOf) -> Response:
    def database() -> bool:
        with context.connection() as conn:
            return conn.execute("SELECT 1").fetchone() is not None

    def store() -> bool:
        # The folder in which parts are written is there, and what is kept can be read.
        context.store.blobs.spool()
        context.store.blobs.get("health")
        return True

    found = {"database": _holds(database), "store": _holds(store), "dagster": _holds(context.dagster.is_ready)}
    ready = all(found.values())
    return Response(
        orjson.dumps({"live": True, "ready": ready, **found}), 200 if ready else 503, media_type="application/json"
    )


def _holds(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except FhirAssetsError:
        return False
