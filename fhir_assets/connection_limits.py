"""An HTTP protocol for uvicorn that limits the bytes and the seconds of each request, and the open connections.

uvicorn itself waits for the end of a request for as long as its client likes, and reads headers of any size.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from typing import Any, Final

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LIMITS_STATE: Final = "connection_limits"
"""The key of the lifespan state under which an application gives its ``ConnectionLimits``."""

_LINGER_SECONDS: Final = 2
"""Seconds in which a client that sends too much can read why; what it sends meanwhile is dropped."""

_numbers = count()


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of the connections of one process: their number, the bytes of a head, the seconds of a head and a body.

    ``body_seconds`` is also the time in which a client must go on reading its answer.
    """

    max_header_bytes: int = 64 * 2**10
    header_seconds: float = 10
    body_seconds: float = 60
    max_connections: int = 500


class _HeadTooLarge(Exception):
    """The headers of a request are larger than the limit. The parser reports it as an invalid request."""


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the ``ConnectionLimits`` of the application, or the default ones.

    A connection beyond the limit takes the place of the oldest one that waits for a request, of the client that has the
    most of these, so that a client with many silent connections keeps out no other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits: ConnectionLimits = self.app_state.get(LIMITS_STATE) or ConnectionLimits()
        self.number = next(_numbers)
        self._unparsed = 0
        self._in_body = False
        self._extended = False
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None
        self._awaited = ""
        self._stalled: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        """Whether no request of the connection is being answered: its head is not complete, or it is answered."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the deadline of the first head, and close another connection if there are too many."""
        super().connection_made(transport)
        self._await("head")
        if len(self.connections) > self.limits.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the deadlines."""
        self._await("")
        self._end_stall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin the deadline of a client that does not read its answer, which stays in memory meanwhile."""
        super().pause_writing()
        self._end_stall()
        self._stalled = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """End the deadline of ``pause_writing``."""
        self._end_stall()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, and refuse a head or a part between chunks that is too large."""
        if self._refused:
            return
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > self.limits.max_header_bytes and not self._refused:
            self._refuse_head()
        if not self._refused:
            self._await("body" if self._in_body else "head" if self._unparsed else "")

    def on_headers_complete(self) -> None:
        """Begin the body. Raises an error, which the parser reports, if the head is too large."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.max_header_bytes:
            self._unparsed = size
            raise _HeadTooLarge
        self._unparsed = 0
        self._in_body = True
        self._extended = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body."""
        self._unparsed = 0
        self._in_body = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be parsed, or whose head is too large."""
        if self._unparsed > self.limits.max_header_bytes:
            self._refuse_head()
        else:
            self._refuse(400, "the request is not HTTP/1.1")

    def shutdown(self) -> None:
        """Close the connection at the end of the server, also if the body of its request is not complete.

        Nothing of such a request was done, and its client could hold the server until its deadline.
        """
        super().shutdown()
        if self._in_body:
            self.transport.close()

    def _await(self, what: str) -> None:
        """Begin the deadline of the head or the body, unless it has begun; an empty text ends the deadline."""
        if what == self._awaited and what != "":
            return
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._awaited = what
        if what:
            seconds = self.limits.header_seconds if what == "head" else self.limits.body_seconds
            self._deadline = self.loop.call_later(seconds, self._expire, what)

    def _end_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _expire(self, what: str) -> None:
        self._deadline, self._awaited = None, ""
        if self.transport.is_closing():
            return
        if self.flow.read_paused or (not self.waits and not self._extended):
            # The server is at work, or has not yet read what arrived. The application itself refuses a slow body.
            self._extended = what == "body"
            self._await(what)
            return
        seconds = self.limits.header_seconds if what == "head" else self.limits.body_seconds
        self._refuse(408, f"the {what} of the request was not complete after {seconds:g} seconds")

    def _refuse_head(self) -> None:
        self._refuse(431, f"the headers are larger than {self.limits.max_header_bytes:,} bytes")

    def _refuse(self, status: int, detail: str) -> None:
        """Answer with a problem, unless a request is being answered, and close the connection."""
        self._refused = True
        self._await("")
        self._unset_keepalive_if_required()
        if self._in_body or not self.waits or not self._unparsed:
            self.transport.close()
            return
        title = HTTPStatus(status).phrase
        body = orjson.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail})
        head = (
            f"HTTP/1.1 {status} {title}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        # A connection that is closed while the client sends is reset, and the client does not see the answer.
        self._deadline = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _make_room(self) -> None:
        waiting = [other for other in self.connections if isinstance(other, LimitedProtocol) and other.waits]
        by_client = Counter(_host(other) for other in waiting)
        oldest = min(waiting, key=lambda other: (other is self, -by_client[_host(other)], other.number))
        oldest.transport.abort()
        self.connections.discard(oldest)


def _host(protocol: LimitedProtocol) -> str:
    return protocol.client[0] if protocol.client else ""
