"""Puts the HTTP API together. Importing this touches nothing; ``create_app`` neither, until it is asked something."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute

from fhir_assets import logs
from fhir_assets.api import WORKERS, health, intake, patients, problems, runs, visits
from fhir_assets.api.access import ACCESS, OPEN, Gatekeeper, parse_tokens
from fhir_assets.api.context import AppContext
from fhir_assets.api.middleware import Guard
from fhir_assets.api.problems import Problem, ProblemDocument
from fhir_assets.settings import Settings, load_settings

VERSION = "1.0.0"


def create_app(settings: Settings, *, workers: int = 1) -> FastAPI:
    """The application. Raises ConfigurationError for malformed API_TOKENS."""
    context = AppContext(settings)
    tokens = parse_tokens(settings.api_tokens.get_secret_value() if settings.api_tokens else "")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        context.close()

    app = FastAPI(
        title="fhir_assets",
        version=VERSION,
        summary="FHIR data into tables one can trust: intake, look-ups, runs",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(_allowed)],
        redirect_slashes=False,
    )
    app.state.context = context
    for module in (visits, intake, patients, runs, health):
        app.include_router(module.router)
    if settings.api_docs:
        _serve_docs(app)
    problems.install(app)
    _require_access(app)
    app.add_middleware(
        Guard,
        gatekeeper=Gatekeeper(tokens, rate=settings.api_rate_limit / workers),
        max_body=settings.api_max_body_bytes,
    )
    return app


def serve() -> FastAPI:
    """What a worker process of `fhir-assets api` serves: the settings of its environment."""
    settings = load_settings()
    logs.configure("api", settings.log_level)
    return create_app(settings, workers=int(os.environ.get(WORKERS, "1")))


def _allowed(request: Request) -> None:
    """Whether the caller's role may call the route. It is asked before anything of the request is read."""
    route = request.scope["route"]
    if route.path in OPEN:
        return
    token = request.scope["fhir_assets.token"]
    allowed = ACCESS[request.method, route.path]
    if token.role not in allowed:
        roles = " or ".join(sorted(allowed))
        raise Problem(403, f"a token of role {token.role} may not do this: it needs {roles}")


def _require_access(app: FastAPI) -> None:
    """A route that nobody decided on stops the application from starting."""
    for route in routes_of(app):
        for method in route.methods or ():
            if route.path not in OPEN and (method, route.path) not in ACCESS:
                raise AssertionError(f"{method} {route.path} is not in api.access.ACCESS: say who may call it")


def routes_of(app: FastAPI) -> list[APIRoute]:
    """Every route of the application. Raises AssertionError for one of a kind whose access nobody checks."""
    found: list[APIRoute] = []
    waiting = list(app.routes)
    while waiting:
        route = waiting.pop(0)
        # Newer versions of FastAPI keep an included router whole.
        router = getattr(route, "original_router", None)
        if router is not None:
            waiting[:0] = router.routes
        elif isinstance(route, APIRoute):
            found.append(route)
        else:
            raise AssertionError(f"a route of type {type(route).__name__}: api.access does not guard it")
    return found


def _serve_docs(app: FastAPI) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    def openapi() -> JSONResponse:
        return JSONResponse(document(app))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return get_swagger_ui_html(openapi_url="/openapi.json", title="fhir_assets")


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: every operation needs a bearer token, but those of OPEN."""
    content = app.openapi()
    schemas = content.setdefault("components", {}).setdefault("schemas", {})
    schemas["Problem"] = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, schema in schemas["Problem"].pop("$defs", {}).items():
        schemas[name] = schema
    content["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in content["paths"].items():
        if path not in OPEN:
            for operation in operations.values():
                operation["security"] = [{"token": []}]
    return content
