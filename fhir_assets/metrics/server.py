"""The HTTP server of Prometheus metrics: few connections, short deadlines.

The server of ``prometheus_client`` gives each connection a thread, and waits for its request without end.
"""

import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socketserver import ThreadingMixIn
from threading import Lock, Thread
from time import monotonic
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

REQUEST_SECONDS: Final = 10
"""Seconds in which a request must arrive."""

MAX_REQUEST_BYTES: Final = 64 * 2**10
MAX_CONNECTIONS: Final = 16
"""Open connections; a further one takes the place of the oldest."""


@contextmanager
def listen(host: str, port: int, registry: CollectorRegistry) -> Iterator[int]:
    """Serve a registry at ``http://host:port/metrics`` during the block, and yield the port. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]

    class Server(_BoundedServer):
        address_family = family

    server = make_server(str(address[0]), port, make_wsgi_app(registry), Server, _Handler)
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _BoundedServer(ThreadingMixIn, WSGIServer):
    """A server with a thread for each of at most MAX_CONNECTIONS connections."""

    daemon_threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._open: dict[socket.socket, None] = {}
        self._lock = Lock()
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: the client closed the connection, or was too slow."""


class _Handler(WSGIRequestHandler):
    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_LimitedReader(self.connection))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class _LimitedReader(socket.SocketIO):
    """Reads at most MAX_REQUEST_BYTES of a socket, within REQUEST_SECONDS. Raises OSError after them."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, "r")
        self._connection = connection
        self._left = MAX_REQUEST_BYTES
        self._deadline = monotonic() + REQUEST_SECONDS

    def readinto(self, buffer: Any) -> int | None:
        remaining = self._deadline - monotonic()
        if remaining <= 0 or self._left <= 0:
            raise OSError("the request is too slow or too large")
        self._connection.settimeout(remaining)
        count = super().readinto(memoryview(buffer)[: self._left])
        self._left -= count or 0
        return count
