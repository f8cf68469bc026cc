"""A FHIR server that says back what it heard, in every field of its errors where others keep quiet."""

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
class Parrot:
    """``status`` is what it answers with; ``says`` the body, in place of its echo; ``heard`` what it was sent."""

    url: str = ""
    status: int = 500
    says: bytes | None = None
    hook: bool = False
    heard: list[bytes] = field(default_factory=list)

    def answer(self, sent: bytes) -> bytes:
        """What it was sent, in all that an OperationOutcome has room for."""
        if self.says is not None:
            return self.says
        text = sent.decode("utf-8", "replace")
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
    """The last string in a JSON text: what a server would quote."""
    strings = [each for each in text.replace("\\", "").split('"') if len(each) > 12 and each.isalnum()]
    return strings[-1] if strings else text[:60]


@contextmanager
def parrot(status: int = 500, says: bytes | None = None) -> Iterator[Parrot]:
    """It, listening."""
    found = Parrot(status=status, says=says)

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
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found.heard += [self.path.encode(), sent]
            known = self.command == "GET" and self.path.endswith("/metadata")
            body = json.dumps(CAPABILITIES).encode() if known else found.answer(sent or unquote(self.path).encode())
            self.send_response(200 if known else found.status, body[:80].decode("latin-1").replace("\n", " "))
            self.send_header("Content-Type", "application/fhir+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}/fhir"
        Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()
