"""What every request passes before a route is looked for: its id, its token, its size; and what every answer bears."""

import logging
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from time import perf_counter
from traceback import extract_tb
from typing import Any
from uuid import uuid4

from fhir_assets.api.access import OPEN, Gatekeeper, Token
from fhir_assets.api.problems import Problem

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}").fullmatch
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
    b"default-src 'none'; connect-src 'self'; img-src 'self' data: https://fastapi.tiangolo.com;"
    b" script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net;"
    b" frame-ancestors 'none'",
)


class Guard:
    """Pure ASGI: nothing of a request is read before its token is known, and no more than it may have."""

    def __init__(self, app: Application, *, gatekeeper: Gatekeeper, max_body: int) -> None:
        self._app = app
        self._gatekeeper = gatekeeper
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID(given) else uuid4().hex
        scope["fhir_assets.request_id"] = request_id
        answer = _Answer(send, request_id, docs=scope["path"] == "/docs")
        started = perf_counter()
        token: Token | None = None
        try:
            token = self._admit(scope, headers)
            scope["fhir_assets.token"] = token
            await self._app(scope, self._limited(headers, receive), answer)
        except Problem as problem:
            await self._refuse(scope, receive, answer, problem, request_id)
        except Exception as error:
            place = extract_tb(error.__traceback__)[-1]
            # Neither the message nor the trace: either may quote what it choked on.
            _log.error(
                "a request failed",
                extra={
                    "request": request_id,
                    "error": type(error).__name__,
                    "place": f"{Path(place.filename).name}:{place.lineno}",
                },
            )
            fault = Problem(500, "this is a fault of the service, and is in its log under the request's id")
            await self._refuse(scope, receive, answer, fault, request_id)
        finally:
            route = scope.get("route")
            _log.info(
                "a request was answered",
                extra={
                    "request": request_id,
                    "method": scope["method"],
                    # The path as the route names it: ids and searches of patients stay out of the log.
                    "route": getattr(route, "path", "-"),
                    "status": answer.status,
                    "token": token.name if token else None,
                    "seconds": round(perf_counter() - started, 4),
                },
            )

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> Token | None:
        if scope["path"] in OPEN:
            return None
        token = self._gatekeeper.recognize(headers.get(b"authorization", b"").decode("latin-1"))
        if token is None:
            kind = "Basic" if scope["path"] in ("/docs", "/openapi.json") else "Bearer"
            raise Problem(
                401,
                "a bearer token is needed: Authorization: Bearer <token>",
                headers={"WWW-Authenticate": f'{kind} realm="fhir_assets"'},
            )
        if wait := self._gatekeeper.wait(token):
            raise Problem(
                429, "this token calls too often: wait as Retry-After says", headers={"Retry-After": str(int(wait) + 1)}
            )
        return token

    def _limited(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """``receive`` that gives no more than the limit, whatever Content-Length says or leaves out."""
        limit = self._max_body
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > limit:
                    raise _too_large(limit)
            return message

        return limited

    async def _refuse(
        self, scope: Scope, receive: Receive, answer: "_Answer", problem: Problem, request_id: str
    ) -> None:
        if not answer.status:
            await problem.response(request_id)(scope, receive, answer)


class _Answer:
    """``send`` that adds what every answer bears, and remembers its status."""

    def __init__(self, send: Send, request_id: str, *, docs: bool) -> None:
        self._send = send
        self._headers = [*_HEADERS, _CSP_DOCS if docs else _CSP, (b"x-request-id", request_id.encode())]
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *self._headers]
        await self._send(message)


def _too_large(limit: int) -> Problem:
    return Problem(
        413,
        f"the body is larger than {limit:,} bytes (API_MAX_BODY_BYTES): send less at once",
        headers={"Connection": "close"},
        more={"max_bytes": limit},
    )
