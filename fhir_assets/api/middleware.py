"""ASGI middleware for every request: request id, authentication, rate and size limits, security headers, access log.

It also turns other exceptions into responses with status 503 or, if they are defects, 500, without patient data.
"""

import logging
import re
from asyncio import get_running_loop, timeout_at
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from time import perf_counter
from traceback import extract_tb
from typing import Any
from uuid import uuid4

from starlette.requests import ClientDisconnect

from fhir_assets.api.access import DOCS_PATHS, PUBLIC_PATHS, Authenticator, RateLimiter, Token, is_read_by_browsers
from fhir_assets.api.problems import Problem, problem_from_foreign_error

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)
_is_request_id = re.compile(rb"[A-Za-z0-9._-]{1,64}").fullmatch
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"strict-transport-security", b"max-age=31536000"),
]
_CSP = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_CSP_DOCS = (
    b"content-security-policy",
    b"default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self' 'unsafe-inline';"
    b" style-src 'self' 'unsafe-inline'; worker-src blob:; frame-ancestors 'none'",
)


class RequestMiddleware:
    """Authenticate and limit each request, and add the headers of each response.

    The class implements ASGI itself, so that a body is read only after authentication, only up to ``max_body`` bytes,
    and only for ``body_seconds``.
    """

    def __init__(
        self,
        app: Application,
        *,
        authenticator: Authenticator,
        rate_limiter: RateLimiter,
        max_body: int,
        body_seconds: float,
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._rate_limiter = rate_limiter
        self._max_body = max_body
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        request_id = sent_id.decode() if _is_request_id(sent_id) else uuid4().hex
        scope["fhir_assets.request_id"] = request_id
        responder = _Responder(send, request_id, docs=scope["path"] in DOCS_PATHS)
        started = perf_counter()
        token: Token | None = None
        try:
            token = self._authenticate(scope, headers)
            scope["fhir_assets.token"] = token
            await self._app(scope, self._limit_body(headers, receive), responder)
        except Problem as problem:
            await self._refuse(scope, receive, responder, problem, request_id)
        except ClientDisconnect:
            pass  # The client, or the end of the server, closed the connection before the body was complete.
        except Exception as error:
            frame = extract_tb(error.__traceback__)[-1]
            # The log gets neither the message nor the stack trace, because either may quote patient data.
            _log.error(
                "a request failed",
                extra={
                    "request": request_id,
                    "error": type(error).__name__,
                    "place": f"{Path(frame.filename).name}:{frame.lineno}",
                },
            )
            defect = Problem(500, "internal error: the service's log contains it with the id of this request")
            await self._refuse(scope, receive, responder, problem_from_foreign_error(error) or defect, request_id)
        finally:
            route = scope.get("route")
            _log.info(
                "a request was answered",
                extra={
                    "request": request_id,
                    "method": scope["method"],
                    # The path template of the route, so that ids and search parameters stay out of the log.
                    "route": getattr(route, "path", "-"),
                    "status": responder.status,
                    "token": token.name if token else None,
                    "seconds": round(perf_counter() - started, 4),
                },
            )

    def _authenticate(self, scope: Scope, headers: dict[bytes, bytes]) -> Token | None:
        if scope["path"] in PUBLIC_PATHS:
            return None
        token = self._authenticator.authenticate(headers.get(b"authorization", b"").decode("latin-1"))
        if token is None:
            scheme = "Basic" if is_read_by_browsers(scope["path"]) else "Bearer"
            raise Problem(
                401,
                "a bearer token is required: Authorization: Bearer <token>",
                headers={"WWW-Authenticate": f'{scheme} realm="fhir_assets"'},
            )
        if wait := self._rate_limiter.take(token):
            raise Problem(
                429,
                "this token sends too many requests: wait for the seconds in Retry-After",
                headers={"Retry-After": str(int(wait) + 1)},
            )
        return token

    def _limit_body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Return a ``receive`` that raises Problem after ``max_body`` bytes, regardless of Content-Length.

        It also raises Problem if the body is not complete ``body_seconds`` after its first part was asked for.
        """
        limit = self._max_body
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        received = 0
        deadline: float | None = None
        complete = False

        async def limited() -> Message:
            nonlocal received, deadline, complete
            if deadline is None:
                deadline = get_running_loop().time() + self._body_seconds
            try:
                # The message after a complete body is the end of the connection.
                async with timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                raise _too_slow(self._body_seconds) from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise _too_large(limit)
                complete = not message.get("more_body", False)
            return message

        return limited

    async def _refuse(
        self, scope: Scope, receive: Receive, responder: "_Responder", problem: Problem, request_id: str
    ) -> None:
        """Send the problem as the response, unless a response was already started."""
        if not responder.status:
            await problem.response(request_id)(scope, receive, responder)


class _Responder:
    """A ``send`` that adds the headers of every response and keeps the response's status."""

    def __init__(self, send: Send, request_id: str, *, docs: bool) -> None:
        self._send = send
        self._headers = [*_HEADERS, _CSP_DOCS if docs else _CSP, (b"x-request-id", request_id.encode())]
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *self._headers]
        await self._send(message)


def _too_slow(seconds: float) -> Problem:
    return Problem(
        408,
        f"the body was not complete after {seconds:g} seconds (API_BODY_SECONDS): send fewer records in a request",
        headers={"Connection": "close"},
    )


def _too_large(limit: int) -> Problem:
    return Problem(
        413,
        f"the body is larger than {limit:,} bytes (API_MAX_BODY_BYTES): send fewer records in a request",
        headers={"Connection": "close"},
        more={"max_bytes": limit},
    )
