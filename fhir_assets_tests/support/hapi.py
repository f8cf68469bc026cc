"""A real HAPI FHIR server with its data in Postgres: built once, started, killed and started again.

The server's source is in ``../shared/hapi``; ``make build/hapi/.built`` copies and builds it.
"""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import requests

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets_tests.support.databases import fresh_database

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = PROJECT.parent / "shared" / "hapi"
_START_SECONDS = 600
"""Alone on the machine, the server takes 20 seconds."""

_CHUNK = 1 << 16

Versions = dict[tuple[str, str], str]
"""The version of each resource by type and id."""


class Hapi:
    """A HAPI server on a free port, with its data in the Postgres database at ``database``, which outlives it."""

    def __init__(self, database: str, log: Path, **properties: object) -> None:
        self._relay = Relay(lambda: _connect_to_postgres(database))
        self._database = urlsplit(database).path
        self._log = log
        self._port = find_free_port()
        self._properties = {"fast.jobs": "true", **properties}
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}/fhir"
        self.session = requests.Session()
        self.session.headers.update({"Content-Type": "application/fhir+json", "Cache-Control": "no-cache"})

    def __enter__(self) -> Self:
        self._relay.__enter__()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.session.close()
        self._relay.__exit__(None, None, None)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        properties = {
            "port": self._port,
            "db.url": f"jdbc:postgresql://127.0.0.1:{self._relay.port}{self._database}",
            "db.user": "postgres",
            "db.pool": 8,
            **self._properties,
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["./start.sh", *(f"-D{name}={value}" for name, value in properties.items())],
                cwd=PROJECT / "build" / "hapi",
                env={**os.environ, "HEAP": "1g"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"HAPI ended at its start: see {self._log}"
            with suppress(requests.RequestException):
                if requests.get(f"{self.url}/metadata", timeout=30).status_code == 200:
                    return
            time.sleep(0.3)
        raise AssertionError(f"HAPI does not answer after {_START_SECONDS} s: see {self._log}")

    def kill(self) -> None:
        """End the server as a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def relay(self) -> "Relay":
        """Return a relay to the server, which counts the requests that it gets."""
        return Relay(lambda: socket.create_connection(("127.0.0.1", self._port)))

    def put(self, resource: dict[str, Any]) -> dict[str, Any]:
        """Create or update a resource under its id, and return it as stored."""
        return self._send("PUT", f"{resource['resourceType']}/{resource['id']}", resource)

    def create(self, resource: dict[str, Any]) -> dict[str, Any]:
        """Create a resource with an id of the server, and return it as stored."""
        return self._send("POST", resource["resourceType"], resource)

    def delete(self, resource_type: str, resource_id: str) -> None:
        """Delete a resource."""
        self._send("DELETE", f"{resource_type}/{resource_id}")

    def put_all(self, resources: list[dict[str, Any]]) -> None:
        """Create or update resources under their ids, in one transaction."""
        entries = [
            {"resource": each, "request": {"method": "PUT", "url": f"{each['resourceType']}/{each['id']}"}}
            for each in resources
        ]
        self._send("POST", "", {"resourceType": "Bundle", "type": "transaction", "entry": entries})

    def read_versions(self, *resource_types: str) -> Versions:
        """Return all resources that the server has, by a search of its own for each type."""
        return {
            (resource["resourceType"], resource["id"]): resource["meta"]["versionId"]
            for resource_type in resource_types
            for resource in self.read(resource_type)
        }

    def read(self, resource_type: str, **parameters: str) -> list[dict[str, Any]]:
        """Return the resources that a search finds, of all its pages."""
        resources: list[dict[str, Any]] = []
        link: str | None = f"{resource_type}?{urlencode({'_count': '200', **parameters})}"
        while link is not None:
            page = self._send("GET", link)
            resources += [entry["resource"] for entry in page.get("entry", [])]
            link = next((link["url"] for link in page["link"] if link["relation"] == "next"), None)
        return resources

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        url = path if path.startswith("http") else f"{self.url}/{path}".rstrip("/")
        answer = self.session.request(method, url, json=body, timeout=60)
        assert answer.ok, f"{method} {path}: {answer.status_code}"
        content: dict[str, Any] = answer.json() if answer.content else {}
        return content


class Relay:
    """Relays TCP connections of ``port`` to the sockets that ``connect`` opens, and counts what clients send.

    Java cannot connect to the Unix socket of a Postgres, and the requests to a server tell how far a load has come.
    """

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent = 0
        """How many times the clients sent something: about the number of requests."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_copy, args=(client, server, self._count), daemon=True).start()
            threading.Thread(target=_copy, args=(server, client, lambda: None), daemon=True).start()

    def _count(self) -> None:
        self.sent += 1


def _copy(source: socket.socket, target: socket.socket, count: Callable[[], None]) -> None:
    with suppress(OSError):
        while data := source.recv(_CHUNK):
            count()
            target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


def _connect_to_postgres(url: str) -> socket.socket:
    (folder,) = parse_qs(urlsplit(url).query)["host"]
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{folder}/.s.PGSQL.5432")
    return server


def build() -> None:
    """Build the server unless it is built. Needs Maven and a JDK 17."""
    subprocess.run(["make", "--no-print-directory", "build/hapi/.built"], cwd=PROJECT, check=True)


@contextmanager
def writing(write: Callable[[], None]) -> Iterator[None]:
    """Call ``write`` again and again in a thread, until the block ends."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            write()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="session")
def hapi(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hapi]:
    """A HAPI server, which all stories of a session share."""
    build()
    log = tmp_path_factory.mktemp("hapi") / "hapi.log"
    with fresh_database(postgres, "template0") as database, Hapi(database, log) as server:
        yield server
