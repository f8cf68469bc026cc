"""Answers over HTTP as no server should give them: their coding, their pace, and the sockets that send them."""

import gzip
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import TypeVar

from fhir_assets_tests.support.listener import listening

CODINGS = ("gzip", "deflate", "gzip, gzip", "br", "nonsense", "undeclared gzip", "declared only", "bomb")
PACES = ("cut", "byte by byte", "headers byte by byte", "endless", "endless headers", "silent", "endless continues")
LINKS = (
    *(
        "{own}/fhir/Patient?page=~",
        "{own}/fhir/status?part=~",
        "{own}/fhir/file/~",
        "/fhir/Patient",
        "",
        "?page=~",
        "//",
    ),
    *("{other}/fhir/Patient", "{other}/file/~", "{private}/latest/meta-data", "http://[bad/x", "file://{canary}"),
    *("{other}\\@{own_host}/fhir", "{own}@{other_host}/", "https://{other_host}/token", "\u0000", "http://a..b/"),
    *("ftp://{other_host}/x", "http://{own_host}:99999/", "{own}/fhir/\ud800", "http://0x7f000002:{private_port}/x"),
)
HEADERS = (
    *(
        "Retry-After: 99999999999",
        "Retry-After: -1",
        "Date: Thu, 01 Jan 1970 99:99:99 GMT",
        "Content-Length: -5",
        "Age: x",
    ),
    *(
        "Content-Length: 99999999999999",
        "Transfer-Encoding: chunked",
        "Set-Cookie: a=b; Domain=.",
        "no colon",
        "X: \xff",
    ),
    *("Location: \x00", "ETag: W/", "X-Progress: \x1b[2J", "Date: Fri, 31 Dec 9999 23:59:59 GMT"),
)
STATUSES = (200, 201, 202, 204, 206, 301, 302, 303, 307, 308, 400, 401, 403, 404, 410, 412, 422, 429, 500, 503, 999)


@dataclass(frozen=True, slots=True)
class Lie:
    """What differs from a right answer. None and empty values differ in nothing."""

    status: int | None = None
    link: str | None = None
    body: bytes | None = None
    coding: str | None = None
    pace: str | None = None
    headers: tuple[str, ...] = ()


@dataclass
class LyingServer:
    """The server at ``origin``, and what ``other`` servers, which the client must not trust, received from it."""

    lies: Mapping[str, Lie] = field(default_factory=dict)
    origin: str = ""
    other: str = ""
    private: str = ""
    canary: str = ""
    received: list[bytes] = field(default_factory=list)
    private_connections: int = 0
    requests: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def answer(self, head: bytes) -> Iterable[bytes]:
        """Return the pieces of the answer to a request."""
        raise NotImplementedError

    def link(self, link: str | None) -> str:
        """Return a link with the names of the servers in it; empty if there is none."""
        if link is None:
            return ""
        names = {"own": self.origin, "other": self.other, "private": self.private, "canary": self.canary}
        hosts = {f"{name}_host": url.removeprefix("http://") for name, url in names.items()}
        port = self.private.rpartition(":")[2]
        return link.replace("~", str(self.requests)).format(**names, **hosts, private_port=port)


Server = TypeVar("Server", bound=LyingServer)


def build_answer(lie: Lie, status: int, headers: dict[str, str], body: bytes) -> Iterable[bytes]:
    """Return the pieces of an answer, with the lie."""
    body = body if lie.body is None else lie.body
    body = _encode(body, lie.coding, headers)
    text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    text += "".join(f"{line}\r\n" for line in lie.headers)
    has_length = any(line.startswith(("Content-Length", "Transfer")) for line in lie.headers)
    if not has_length and lie.pace not in ("endless", "endless line"):
        text += f"Content-Length: {len(body)}\r\n"
    start = f"HTTP/1.1 {status} Whatever\r\n{text}".encode("latin-1", "replace")
    return _pace(start, body, lie.pace)


def _encode(body: bytes, coding: str | None, headers: dict[str, str]) -> bytes:
    if coding is None:
        return body
    if coding == "bomb":
        headers["Content-Encoding"] = "gzip"
        return _BOMB
    if coding not in ("undeclared gzip",):
        headers["Content-Encoding"] = "gzip" if coding == "declared only" else coding
    if coding in ("gzip", "undeclared gzip"):
        return gzip.compress(body)
    if coding == "gzip, gzip":
        return gzip.compress(gzip.compress(body))
    return zlib.compress(body) if coding == "deflate" else body


_BOMB = gzip.compress(bytes(1 << 24))


def _pace(start: bytes, body: bytes, pace: str | None) -> Iterable[bytes]:
    whole = start + b"\r\n" + body
    match pace:
        case "cut":
            return [whole[: len(start) + 2 + len(body) // 2]]
        case "byte by byte":
            return chain([start + b"\r\n"], _slowly(body + b" " * 10_000))
        case "headers byte by byte":
            return _slowly(start + b"X: " + b"a" * 10_000)
        case "endless":
            return chain([whole], repeat(b'{"resourceType":"Patient","id":"x"}\n' * 1000))
        case "endless line":
            return chain([whole], repeat(b"x" * 1_000_000))
        case "endless headers":
            return chain([start], repeat(b"X: " + b"a" * 60_000 + b"\r\n"))
        case "endless continues":
            return repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)
        case "silent":
            return chain([start], _slowly(b""))
    return [whole]


def _slowly(content: bytes) -> Iterator[bytes]:
    for number in range(len(content)):
        time.sleep(0.02)
        yield content[number : number + 1]
    time.sleep(0.5)


def _receive(connection: socket.socket) -> bytes:
    """Return a request with its body, as far as it comes with its headers."""
    request = b""
    while b"\r\n\r\n" not in request:
        piece = connection.recv(1 << 16)
        if not piece:
            return b""
        request += piece
    head, _, body = request.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    pieces = [head, b"\r\n\r\n", body]
    left = int(lengths[0]) - len(body) if lengths else 0
    while left > 0 and (piece := connection.recv(1 << 20)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


@contextmanager
def _listen(address: str, handle: Callable[[socket.socket], None]) -> Iterator[str]:
    def serve(connection: socket.socket) -> None:
        connection.settimeout(20)
        handle(connection)

    with listening(serve, address) as port:
        yield f"http://{address}:{port}"


@contextmanager
def serve_lies(server: Server) -> Iterator[Server]:
    """Run the server, another one at its address, and one at a private address, during the block."""

    def hostile(connection: socket.socket) -> None:
        while head := _receive(connection):
            for piece in server.answer(head):
                if server.stopped.is_set():
                    return
                connection.sendall(piece)
            if server.lies:
                return

    def other(connection: socket.socket) -> None:
        server.received.append(_receive(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    def private(connection: socket.socket) -> None:
        server.private_connections += 1
        server.received.append(_receive(connection))

    with (
        _listen("127.0.0.1", hostile) as server.origin,
        _listen("127.0.0.1", other) as server.other,
        _listen("127.0.0.2", private) as server.private,
    ):
        try:
            yield server
        finally:
            server.stopped.set()
