"""Assembly of the HTTP API. Importing this module and creating the application open no connection and no file."""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute

from fhir_assets import logs
from fhir_assets.api import WORKERS_VARIABLE, audit, docs, exports, health, intake, patients, problems, runs, visits
from fhir_assets.api.access import PUBLIC_PATHS, ROUTE_ROLES, Authenticator, RateLimiter, parse_tokens
from fhir_assets.api.context import AppContext
from fhir_assets.api.middleware import RequestMiddleware
from fhir_assets.api.parent import end_with_parent
from fhir_assets.api.problems import Problem, ProblemDocument
from fhir_assets.connection_limits import LIMITS_STATE, ConnectionLimits
from fhir_assets.file_modes import restrict_umask
from fhir_assets.settings import Settings, load_settings


def create_app(settings: Settings, *, workers: int = 1) -> FastAPI:
    """Build the application. ``workers`` is the number of processes that share the request rate of a token.

    Raises ConfigurationError if API_TOKENS is malformed.
    """
    context = AppContext(settings)
    tokens = parse_tokens(settings.api_tokens.get_secret_value() if settings.api_tokens else "")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        yield {LIMITS_STATE: _build_limits(settings)}
        context.close()

    app = FastAPI(
        title="fhir_assets",
        version=version("fhir-assets"),
        summary="FHIR data in Postgres tables: intake of records, patient look-ups, runs",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(_require_role), Depends(_require_known_parameters)],
        redirect_slashes=False,
    )
    app.state.context = context
    for module in (visits, intake, patients, runs, exports, health, audit):
        app.include_router(module.router)
    if settings.api_docs:
        app.include_router(docs.build_router(lambda: build_openapi(app)))
    problems.install_handlers(app)
    _require_roles_of_all_routes(app)
    app.add_middleware(
        RequestMiddleware,
        authenticator=Authenticator(tokens),
        rate_limiter=RateLimiter(tokens, rate=settings.api_rate_limit / workers),
        max_body=settings.api_max_body_bytes,
        body_seconds=settings.api_body_seconds,
    )
    return app


def _build_limits(settings: Settings) -> ConnectionLimits:
    return ConnectionLimits(
        max_header_bytes=settings.api_max_header_bytes,
        header_seconds=settings.api_header_seconds,
        body_seconds=settings.api_body_seconds,
        max_connections=settings.api_max_connections,
    )


def create_worker_app() -> FastAPI:
    """Build the application of a worker process of `fhir-assets api`, from the settings of its environment."""
    restrict_umask()
    end_with_parent()
    settings = load_settings()
    logs.configure("api", settings.log_level)
    return create_app(settings, workers=int(os.environ.get(WORKERS_VARIABLE, "1")))


def _require_role(request: Request) -> None:
    """Raise Problem unless the caller's role may call the route. Runs before the body of the request is read."""
    route = request.scope["route"]
    if route.path in PUBLIC_PATHS:
        return
    token = request.scope["fhir_assets.token"]
    allowed = ROUTE_ROLES[request.method, route.path]
    if token.role not in allowed:
        roles = " or ".join(sorted(allowed))
        raise Problem(403, f"a token of role {token.role} may not call this operation: it needs the role {roles}")


def _require_known_parameters(request: Request) -> None:
    """Raise Problem if the query has a parameter that the operation does not support, such as a misspelt one.

    The problem does not repeat its name, which may be any text.
    """
    known = sorted(parameter.alias for parameter in request.scope["route"].dependant.query_params)
    if any(name not in known for name in request.query_params):
        supported = f"it supports {', '.join(known)}" if known else "it supports none"
        raise Problem(422, f"the query has a parameter that this operation does not support: {supported}")


def _require_roles_of_all_routes(app: FastAPI) -> None:
    """Raise AssertionError if ROUTE_ROLES does not list a route."""
    for route in list_routes(app):
        for method in route.methods or ():
            if route.path not in PUBLIC_PATHS and (method, route.path) not in ROUTE_ROLES:
                raise AssertionError(f"{method} {route.path} is not in api.access.ROUTE_ROLES: add its roles there")


def list_routes(app: FastAPI) -> list[APIRoute]:
    """Return all routes of the application. Raises AssertionError for a kind of route that has no role check."""
    routes: list[APIRoute] = []
    pending = list(app.routes)
    while pending:
        route = pending.pop(0)
        # Newer versions of FastAPI list an included router as one route.
        router = getattr(route, "original_router", None)
        if router is not None:
            pending[:0] = router.routes
        elif isinstance(route, APIRoute):
            routes.append(route)
        else:
            raise AssertionError(f"api.access does not check the roles of a route of type {type(route).__name__}")
    return routes


def build_openapi(app: FastAPI) -> dict[str, Any]:
    """Build the OpenAPI document. Every operation except those of PUBLIC_PATHS requires a bearer token."""
    document = app.openapi()
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Problem"] = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, schema in schemas["Problem"].pop("$defs", {}).items():
        schemas[name] = schema
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        if path not in PUBLIC_PATHS:
            for operation in operations.values():
                operation["security"] = [{"token": []}]
    return document
