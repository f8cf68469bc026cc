"""Connections that enforce the limits of answers, for ``http.client``, ``urllib3`` and ``requests``.

All three read an answer through the response class of ``http.client``, so that the limits hold for the status line, the
headers, the framing of chunks and the body, with and without TLS.
"""

import io
import socket
from http.client import HTTPConnection, HTTPResponse
from typing import TYPE_CHECKING, Any

import urllib3
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from fhir_assets.fhir.transport.limits import AnswerLimits, Budget

_PIECE_BYTES = 1 << 16

if TYPE_CHECKING:
    _Base = HTTPConnection
else:
    _Base = object


class LimitedConnection(_Base):
    """A part of a connection class: each request on the connection has the same ``limits``."""

    limits = AnswerLimits()

    def begin(self) -> None:
        """Begin to spend the limits."""
        self._budget = Budget(self.limits)

    def connect(self) -> None:
        """Connect."""
        self.begin()
        super().connect()

    def putrequest(self, *args: Any, **options: Any) -> None:
        """Begin a request."""
        self.begin()
        if self.sock is not None:
            self.sock.settimeout(self.timeout)  # the request before may have shortened it
        super().putrequest(*args, **options)

    def send(self, data: Any) -> None:
        """Send a part of a request, in pieces: a server that reads slowly is given up, too."""
        if not isinstance(data, bytes) or self.sock is None:
            super().send(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), _PIECE_BYTES):
            with _Wait(self.sock, self._budget):
                super().send(view[start : start + _PIECE_BYTES])

    def response_class(  # type: ignore[override]
        self, sock: socket.socket, *args: Any, **options: Any
    ) -> HTTPResponse:
        """Return the response to the current request."""
        response = HTTPResponse(sock, *args, **options)
        response.fp = io.BufferedReader(_LimitedStream(response.fp.detach(), sock, self._budget))
        return response


class _Wait:
    """A wait for the server, used in a ``with`` block: the timeout of the socket is shortened to what is left."""

    def __init__(self, sock: socket.socket, budget: Budget) -> None:
        self._socket = sock
        self._budget = budget

    def __enter__(self) -> None:
        left = self._budget.start_wait()
        timeout = self._socket.gettimeout()
        if timeout is None or left < timeout:
            self._socket.settimeout(left)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._budget.end_wait()
        if isinstance(error, TimeoutError):
            self._budget.start_wait()  # raises if the limit, and not the timeout of the socket, has passed


class _LimitedStream(io.RawIOBase):
    """The bytes that a socket receives."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, budget: Budget) -> None:
        self._raw = raw
        self._socket = sock
        self._budget = budget

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int | None:
        with _Wait(self._socket, self._budget):
            count: int | None = self._raw.readinto(buffer)
        self._budget.receive(count or 0)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _PlainConnection(LimitedConnection, urllib3.connection.HTTPConnection):
    pass


class _TlsConnection(LimitedConnection, urllib3.connection.HTTPSConnection):
    pass


def limit_pools(manager: urllib3.PoolManager, limits: AnswerLimits) -> None:
    """Enforce limits on all connections that a pool manager of ``urllib3`` will make."""
    if type(manager) not in (urllib3.PoolManager, urllib3.ProxyManager):
        return  # a SOCKS proxy has connections of its own
    plain = type("PlainConnection", (_PlainConnection,), {"limits": limits})
    tls = type("TlsConnection", (_TlsConnection,), {"limits": limits})
    manager.pool_classes_by_scheme = pool_classes(plain, tls)


def pool_classes(plain: type[LimitedConnection], tls: type[LimitedConnection]) -> dict[str, Any]:
    """Return the pools of two classes of connections, by scheme, as a pool manager of ``urllib3`` has them."""
    return {
        "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("TlsPool", (HTTPSConnectionPool,), {"ConnectionCls": tls}),
    }
