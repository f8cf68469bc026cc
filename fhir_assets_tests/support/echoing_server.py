"""A FHIR server that quotes each request in every field of its error response."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

CAPABILITIES = {"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1", "rest": [{"mode": "server"}]}


@dataclass
class EchoServer:
    """The state of the server: the ``status`` of its responses, a fixed ``body`` in place of the echo, and the paths
    and bodies that it ``received``.
    """

    url: str = ""
    status: int = 500
    body: bytes | None = None
    received: list[bytes] = field(default_factory=list)

    def respond(self, request: bytes) -> bytes:
        """Return an OperationOutcome that contains the request in every element."""
        if self.body is not None:
            return self.body
        text = request.decode("utf-8", "replace")
        issue = {
            "severity": "error",
            "code": _words(text),
            "details": {"text": text, "coding": [{"code": _words(text), "display": text}]},
            "diagnostics": text,
            "location": [text],
            "expression": [_words(text), text],
        }
        outcome = {
            "resourceType": "OperationOutcome",
            "text": {"status": "generated", "div": f"<div>{text}</div>"},
            "issue": [issue],
        }
        return json.dumps(outcome).encode()


def _words(text: str) -> str:
    """Return the last long string in a JSON text, which a server is likely to quote."""
    strings = [part for part in text.replace("\\", "").split('"') if len(part) > 12 and part.isalnum()]
    return strings[-1] if strings else text[:60]


@contextmanager
def serve_echo(status: int = 500, body: bytes | None = None) -> Iterator[EchoServer]:
    """Run the server during the block."""
    state = EchoServer(status=status, body=body)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def do_DELETE(self) -> None:
            self._answer()

        def _answer(self) -> None:
            request = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.received += [self.path.encode(), request]
            is_metadata = self.command == "GET" and self.path.endswith("/metadata")
            body = (
                json.dumps(CAPABILITIES).encode()
                if is_metadata
                else state.respond(request or unquote(self.path).encode())
            )
            self.send_response(200 if is_metadata else state.status, body[:80].decode("latin-1").replace("\n", " "))
            self.send_header("Content-Type", "application/fhir+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}/fhir"
        Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()
