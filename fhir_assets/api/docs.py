"""The pages that show the OpenAPI document: Swagger UI and ReDoc. Their files are served from a package, not a CDN."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

from fhir_assets.api.problems import Problem

TITLE = "fhir_assets"
FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png")
"""The files of the package ``fastapi_offline`` that the pages refer to."""


def build_router(build_document: Callable[[], dict[str, Any]]) -> APIRouter:
    """Return the routes of the OpenAPI document, of the two pages, and of their files."""
    router = APIRouter(include_in_schema=False)
    folder = FilePath(str(files("fastapi_offline"))) / "static"

    @router.get("/openapi.json")
    def show_document() -> JSONResponse:
        return JSONResponse(build_document())

    @router.get("/docs")
    def show_swagger_ui() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=TITLE,
            swagger_js_url="/docs/files/swagger-ui-bundle.js",
            swagger_css_url="/docs/files/swagger-ui.css",
            swagger_favicon_url="/docs/files/favicon.png",
        )

    @router.get("/redoc")
    def show_redoc() -> HTMLResponse:
        return get_redoc_html(
            openapi_url="/openapi.json",
            title=TITLE,
            redoc_js_url="/docs/files/redoc.standalone.js",
            redoc_favicon_url="/docs/files/favicon.png",
            with_google_fonts=False,
        )

    @router.get("/docs/files/{name}")
    def send_file(name: Annotated[str, Path(max_length=64)]) -> FileResponse:
        if name not in FILES:
            raise Problem(404, "the documentation pages have no such file")
        return FileResponse(folder / name)

    return router
