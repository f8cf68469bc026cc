"""Errors as RFC 9457 problems: what happened and what to do, never a value of the request, never a stack trace."""

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

MEDIA_TYPE = "application/problem+json"


class FieldError(BaseModel):
    """One thing that is wrong with a request: where, and what is expected there."""

    path: str = Field(description="Where: a JSON Pointer into the body, or `query.<name>`", examples=["/0/mrn"])
    message: str = Field(description="What is expected there. Never holds what was sent")


class ProblemDocument(BaseModel):
    """RFC 9457."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str | None = None
    request_id: str | None = None
    errors: list[FieldError] | None = None


class Problem(Exception):
    """An answer that is no success. ``more`` goes into the document as further members."""

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
        """The document."""
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


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that an operation documents, beside those that every one has."""
    return {
        status: {
            "description": _MEANS[status],
            "content": {
                MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": {
                        "type": "about:blank",
                        "title": HTTPStatus(status).phrase,
                        "status": status,
                        "detail": _MEANS[status],
                        "request_id": "4a9d0c3c1b6f1f7d11",
                    },
                }
            },
        }
        for status in sorted({*_ALWAYS, *statuses})
    }


_ALWAYS = (401, 403, 409, 413, 422, 429, 500, 503)
_MEANS = {
    400: "the request's form is not what this operation takes",
    401: "a bearer token is needed",
    403: "the token's role may not do this, or the patient's consent does not allow it: then `reason` is `consent`",
    404: "there is no such thing",
    409: "a setting that this needs is missing or contradicts it",
    410: "the source deleted it",
    413: "the body or the list is longer than API_MAX_BODY_BYTES or API_MAX_RECORDS allow",
    422: "a parameter is not of the kind that is asked for; `errors` says which",
    429: "the token calls more often than API_RATE_LIMIT allows: wait as Retry-After says",
    500: "a fault of the service; its log has it under the request's id",
    502: "the FHIR server refused, or answered what is no FHIR",
    503: "the database, the store, Dagster or the FHIR server is not there: try again as Retry-After says",
}


def of_error(error: FhirAssetsError) -> Problem:
    """An error of the project: its message names no patient, and says what to do."""
    if isinstance(error, TransientError):
        return Problem(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, ServerRefused | NotFhir):
        return Problem(502, str(error))
    if isinstance(error, StoreError):
        return Problem(503, str(error), headers={"Retry-After": "60"})
    if isinstance(error, ConfigurationError):
        return Problem(409, str(error))
    return Problem(500, str(error))


def install(app: FastAPI) -> None:
    """Every error of the application becomes a problem; what nobody expected is the middleware's."""

    @app.exception_handler(Problem)
    async def of_problem(request: Request, error: Problem) -> Response:
        return error.response(_request_id(request))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        # The router's own: no such path, no such method.
        detail = {404: "there is nothing here", 405: "this path knows other methods"}.get(error.status_code, "")
        return Problem(error.status_code, detail, headers=error.headers).response(_request_id(request))

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        # ``msg`` of a validator may quote its input, so only the kinds that pydantic has itself are told.
        errors = [
            FieldError(path=".".join(map(str, each["loc"])), message=_said(each["type"], each.get("ctx") or {}))
            for each in error.errors()
        ]
        return Problem(422, "the request does not fit what this operation takes", errors=errors).response(
            _request_id(request)
        )

    @app.exception_handler(FhirAssetsError)
    async def of_project(request: Request, error: FhirAssetsError) -> Response:
        return of_error(error).response(_request_id(request))


def _said(kind: str, context: Mapping[str, Any]) -> str:
    limits = [f"{name} {context[name]}" for name in ("ge", "le", "gt", "lt", "min_length", "max_length", "expected")
              if name in context]  # fmt: skip
    return " ".join([kind.replace("_", " "), *limits])


def _request_id(request: Request) -> str | None:
    found = request.scope.get("fhir_assets.request_id")
    return found if isinstance(found, str) else None
