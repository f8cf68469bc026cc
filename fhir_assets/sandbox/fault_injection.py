"""ASGI middleware in front of the FHIR routes: counts requests, checks credentials and injects faults.

The middleware uses plain ASGI, because faults change responses before they are sent, or close the socket.
"""

import asyncio
import base64
import hmac
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fhir_assets.sandbox.faults import Fault, FaultDraw, FaultKind, FaultPlan, RequestKind
from fhir_assets.sandbox.outcomes import Refusal

CLOSE_SOCKET = "sandbox.close"
"""The ASGI extension that closes the connection immediately; ``process`` adds it."""

_HANDLED_BY_ROUTES = frozenset(
    {FaultKind.DUPLICATE, FaultKind.LOSE_PAGE, FaultKind.WRONG_TOTAL, FaultKind.SLOW, FaultKind.MALFORMED}
)
_HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credentials that a client must send: user name and password, or a bearer token."""

    username: str | None = None
    password: str | None = None
    token: str | None = None

    @property
    def header(self) -> str:
        """The Authorization header that is accepted."""
        if self.token is not None:
            return f"Bearer {self.token}"
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(slots=True)
class Stats:
    """Statistics of requests since the start of the server, or since they were reset.

    ``struck`` counts the faults that occurred, by kind. Most responses take less than a millisecond; ``max_in_flight``
    therefore shows concurrent calls reliably only while a slow fault delays them.
    """

    requests: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    max_in_flight: int = 0
    kick_offs: int = 0
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=10_000))


class Control:
    """The statistics and the faults of a running server."""

    def __init__(self, plan: FaultPlan) -> None:
        self.stats = Stats()
        self.faults = FaultDraw(plan)


def classify_request(method: str, path: str, query: str) -> RequestKind:
    """Return the kind of a request. ``path`` is relative to the FHIR base, without a leading slash."""
    parts = path.split("/") if path else []
    if parts[-1:] == ["$export"]:
        return RequestKind.KICK_OFF
    if parts[:1] == ["_export"] and method == "GET":
        return RequestKind.FILE if len(parts) == 3 else RequestKind.POLL
    if "_history" in parts:
        return RequestKind.READ if parts[-1] != "_history" else RequestKind.HISTORY
    if method == "POST" and parts[-1:] != ["_search"]:
        return RequestKind.CREATE if parts else RequestKind.BATCH
    if method in ("PUT", "PATCH"):
        return RequestKind.UPDATE
    if method == "DELETE":
        return RequestKind.DELETE
    if parts == ["metadata"]:
        return RequestKind.METADATA
    if len(parts) == 2 and parts[1] != "_search":
        return RequestKind.READ
    if "_page=" in query:
        return RequestKind.PAGE
    return RequestKind.COUNT if "_summary=count" in query else RequestKind.SEARCH


class FaultInjection:
    """ASGI middleware around the routes below ``/fhir``."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        base: str,
        credentials: Credentials | None,
        control: Control,
        admits: Callable[[str], bool] | None = None,
    ) -> None:
        """Wrap ``app``. ``admits`` returns whether an Authorization header is valid; it replaces ``credentials``."""
        self._app = app
        self._admits = admits
        self._base_url = base
        self._control = control
        self._expected = credentials.header.encode() if credentials else None
        self._scheme = credentials.header.split()[0] if credentials else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not (path == self._base_url or path.startswith(self._base_url + "/")):
            await self._app(scope, receive, send)
            return
        query = scope["query_string"].decode("latin-1")
        kind = classify_request(scope["method"], path[len(self._base_url) :].strip("/"), query)
        stats = self._control.stats
        stats.requests[kind] += 1
        stats.recent.append(f"{scope['method']} {path}{'?' + query if query else ''}")
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        try:
            await asyncio.sleep(0)
            await self._serve(kind, scope, receive, _count_statuses(stats, send))
        finally:
            stats.in_flight -= 1

    async def _serve(self, kind: RequestKind, scope: Scope, receive: Receive, send: Send) -> None:
        if kind is not RequestKind.METADATA and not scope["path"].endswith("/smart-configuration"):
            authorization = dict(scope["headers"]).get(b"authorization", b"")
            if not self._is_authorized(authorization):
                refusal = Refusal(401, "login", "Credentials are missing or wrong")
                challenge = f'{self._scheme or "Bearer"} realm="sandbox"'
                await _render_response(refusal, {"WWW-Authenticate": challenge})(scope, receive, send)
                return
        drawn = self._control.faults.draw(kind)
        for fault_kind in drawn:
            self._control.stats.struck[fault_kind] += 1
        scope.setdefault("state", {})["faults"] = drawn
        if FaultKind.SLOW in drawn:
            await asyncio.sleep(drawn[FaultKind.SLOW].seconds)
        fault = next((fault for fault in drawn.values() if fault.kind not in _HANDLED_BY_ROUTES), None)
        match fault.kind if fault else None:
            case FaultKind.RESET:
                scope["extensions"][CLOSE_SOCKET]()
                await asyncio.sleep(0.01)
            case FaultKind.THROTTLE | FaultKind.ERROR if fault:
                await _failure(fault)(scope, receive, send)
            case FaultKind.HTML:
                await Response(_HTML, media_type="text/html")(scope, receive, send)
            case FaultKind.TRUNCATE:
                await self._app(scope, receive, _truncate_response(send, keep_length=False))
            case FaultKind.DROP:
                await self._app(scope, receive, _truncate_response(send, keep_length=True))
            case _:
                await self._app(scope, receive, send)

    def _is_authorized(self, authorization: bytes) -> bool:
        if self._admits is not None:
            return self._admits(authorization.decode("latin-1"))
        return self._expected is None or hmac.compare_digest(authorization, self._expected)


def _count_statuses(stats: Stats, send: Send) -> Send:
    async def counting(message: Message) -> None:
        if message["type"] == "http.response.start":
            stats.statuses[message["status"]] += 1
        await send(message)

    return counting


def _render_response(refusal: Refusal, headers: dict[str, str]) -> Response:
    return Response(
        refusal.body, refusal.status, headers={**refusal.headers, **headers}, media_type="application/fhir+json"
    )


def _failure(fault: Fault) -> Response:
    throttled = fault.kind is FaultKind.THROTTLE
    headers: dict[str, str] = {}
    retry_after = fault.retry_after if fault.retry_after is not None or not throttled else 1
    if retry_after is not None:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=retry_after), usegmt=True)
        headers["Retry-After"] = date if fault.retry_after_date else str(retry_after)
    code, reason = ("throttled", "Too many requests") if throttled else ("exception", "The sandbox injected a fault")
    return _render_response(Refusal(fault.answer_status, code, reason), headers)


def _truncate_response(send: Send, *, keep_length: bool) -> Callable[[Message], Awaitable[None]]:
    """Send half of a response. With ``keep_length``, Content-Length is not adjusted, and the connection breaks."""
    starts: list[Message] = []

    async def cutting(message: Message) -> None:
        if message["type"] == "http.response.start":
            starts.append(message)
            return
        if not starts:
            return
        start = starts.pop()
        half = message["body"][: len(message["body"]) // 2]
        if not keep_length:
            length = (b"content-length", str(len(half)).encode())
            start["headers"] = [h for h in start["headers"] if h[0].lower() != b"content-length"] + [length]
        await send(start)
        await send({"type": "http.response.body", "body": half, "more_body": keep_length})

    return cutting
