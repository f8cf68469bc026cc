"""An HTTP server whose responses a test scripts, with faults such as a body that is cut off or a reset connection."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request as the server received it."""

    method: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    body: bytes
    connection: tuple[str, int]

    def all(self, name: str) -> list[str]:
        """Return the values of a query parameter."""
        return [value for key, value in self.query if key == name]


@dataclass(frozen=True, slots=True)
class Reply:
    """A response.

    ``cut`` sends only this many bytes of the body, under the Content-Length of the whole body. ``reset`` closes the
    connection without a response.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    reset: bool = False


def reply(value: object, status: int = 200, **headers: str) -> Reply:
    """Return a response with a value as JSON. Header names are written with underscores."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Reply(body, status, {name.replace("_", "-"): text for name, text in headers.items()})


class ScriptedServer:
    """A server that answers with ``script``: a function of the request, or replies in order.

    ``address`` is the address of this machine that it listens on.
    """

    def __init__(
        self, script: Callable[[ReceivedRequest], Reply] | Sequence[Reply], *, address: str = "127.0.0.1"
    ) -> None:
        self.requests: list[ReceivedRequest] = []
        if callable(script):
            answer = script
        else:
            replies: Iterator[Reply] = iter(script)

            def answer(request: ReceivedRequest) -> Reply:
                return next(replies, Reply(b"the script has ended", 418))

        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def answer(self) -> None:
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = ReceivedRequest(
                    self.command,
                    url.path,
                    parse_qsl(url.query, keep_blank_values=True),
                    dict(self.headers),
                    body,
                    self.client_address,
                )
                server.requests.append(request)
                response = answer(request)
                if response.reset:
                    self.close_connection = True
                    return
                self.send_response_only(response.status)
                for name, value in {"Content-Type": "application/fhir+json", **response.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(response.body)))
                self.end_headers()
                self.wfile.write(response.body[: response.cut])
                self.close_connection = self.close_connection or response.cut is not None

            do_GET = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.origin = f"http://{address}:{self._server.server_port}"
        self.url = f"{self.origin}/fhir"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
