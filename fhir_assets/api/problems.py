"""Errors as problem details (RFC 9457).

A problem describes the error and the next step. It never contains a value of the request or a stack trace.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from fhir_assets.errors import (
    ConfigurationError,
    FhirAssetsError,
    NotFhir,
    ServerRefused,
    StoreError,
    TransientError,
)
from fhir_assets.foreign_errors import translate_error

MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """An invalid field of a request: its path, and the expected value or format."""

    path: str = Field(description="A JSON Pointer into the body, or `query.<name>`", examples=["/0/mrn"])
    message: str = Field(description="The expected value or format; never the value that was sent")


class ProblemDocument(BaseModel):
    """Problem details (RFC 9457, section 3), with the members `request_id` and `errors`."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str | None = None
    request_id: str | None = None
    errors: list[FieldError] | None = None


class Problem(Exception):
    """An error that becomes a response with problem details.

    ``errors`` lists invalid parts of the request; ``more`` holds extension members (RFC 9457, section 3.2).
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})
        self.more = dict(more or {})

    def response(self, request_id: str | None = None) -> Response:
        """Build the response with the problem details."""
        content: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            **self.more,
        }
        if request_id:
            content["request_id"] = request_id
        if self.errors:
            content["errors"] = [error.model_dump() for error in self.errors]
        return Response(orjson.dumps(content), self.status, headers=self.headers, media_type=MEDIA_TYPE)


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses for ``statuses`` and for the error statuses that all operations have."""
    return {
        status: {
            "description": _DESCRIPTIONS[status],
            "content": {
                MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": {
                        "type": "about:blank",
                        "title": HTTPStatus(status).phrase,
                        "status": status,
                        "detail": _DESCRIPTIONS[status],
                        "request_id": "4a9d0c3c1b6f1f7d11",
                    },
                }
            },
        }
        for status in sorted({*_COMMON_STATUSES, *statuses})
    }


_COMMON_STATUSES = (401, 403, 408, 409, 413, 422, 429, 431, 500, 503)
_DESCRIPTIONS = {
    415: "the body is not JSON in UTF-8",
    400: "the request is malformed",
    401: "a bearer token is required",
    403: "the token's role may not call this operation, or the patient's consent denies access (`reason` is `consent`)",
    404: "there is no resource with this id",
    408: "the request was not complete after API_HEADER_SECONDS or API_BODY_SECONDS",
    409: "the settings do not allow this operation, or lack one that it requires; or an earlier request with the same "
    "Idempotency-Key is still in progress",
    410: "the source deleted the resource",
    413: "the body is larger than API_MAX_BODY_BYTES, or has more records than API_MAX_RECORDS",
    422: "a parameter is not valid; `errors` lists the invalid ones",
    429: "the token sends more requests than API_RATE_LIMIT allows: wait for the seconds in Retry-After",
    431: "the headers are larger than API_MAX_HEADER_BYTES",
    500: "internal error: the service's log contains it with the id of the request",
    502: "the FHIR server refused the request, or its answer is not FHIR",
    503: "the database, the store, Dagster or the FHIR server is not available: wait for the seconds in Retry-After",
}


def problem_from_error(error: FhirAssetsError) -> Problem:
    """Return the problem for an error of the project. Messages of these errors contain no patient data."""
    if isinstance(error, TransientError):
        return Problem(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, ServerRefused | NotFhir):
        return Problem(502, str(error))
    if isinstance(error, StoreError):
        return Problem(503, str(error), headers={"Retry-After": "60"})
    if isinstance(error, ConfigurationError):
        return Problem(409, str(error))
    return Problem(500, str(error))


def problem_from_foreign_error(error: Exception) -> Problem | None:
    """Return the problem for an error of Postgres, the system, S3 or the network; None for a defect of the project.

    Whatever it is, the same request may succeed once it is mended.
    """
    known = translate_error(error)
    if known is None:
        return None
    wait = "5" if isinstance(known, TransientError) else "60"
    return Problem(503, str(known), headers={"Retry-After": wait})


def install_handlers(app: FastAPI) -> None:
    """Install the handlers that turn errors into problems. The middleware handles all other exceptions."""

    @app.exception_handler(Problem)
    async def handle_problem(request: Request, error: Problem) -> Response:
        return error.response(_request_id(request))

    @app.exception_handler(HTTPException)
    async def handle_http_exception(request: Request, error: HTTPException) -> Response:
        # Errors of the router: an unknown path or method.
        detail = {404: "this path does not exist", 405: "this path does not support this method"}.get(
            error.status_code, ""
        )
        return Problem(error.status_code, detail, headers=error.headers).response(_request_id(request))

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> Response:
        # ``msg`` of a validator may quote its input, so the message is built from pydantic's type of error.
        errors = [
            FieldError(
                path=".".join(map(str, invalid["loc"])), message=_describe(invalid["type"], invalid.get("ctx") or {})
            )
            for invalid in error.errors()
        ]
        return Problem(422, "the request is not valid: see `errors`", errors=errors).response(_request_id(request))

    @app.exception_handler(FhirAssetsError)
    async def handle_project_error(request: Request, error: FhirAssetsError) -> Response:
        return problem_from_error(error).response(_request_id(request))


def _describe(kind: str, context: Mapping[str, Any]) -> str:
    limits = [f"{name} {context[name]}" for name in ("ge", "le", "gt", "lt", "min_length", "max_length", "expected")
              if name in context]  # fmt: skip
    return " ".join([kind.replace("_", " "), *limits])


def _request_id(request: Request) -> str | None:
    request_id = request.scope.get("fhir_assets.request_id")
    return request_id if isinstance(request_id, str) else None
