"""Folders of NDJSON, the command ``fhir-assets upload``, a server that refuses, and what a server has afterwards."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
import typer
from typer.testing import CliRunner, Result

from fhir_assets.cli.upload import upload as upload_command
from fhir_assets.fhir.bundles import has_same_content
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, reply

Resource = Mapping[str, Any]


def write(path: Path, resources: Iterable[Resource | bytes]) -> None:
    """Write one resource per line, compressed if the name ends with ``.gz``."""
    lines = b"".join(
        (resource if isinstance(resource, bytes) else json.dumps(resource).encode()) + b"\n" for resource in resources
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def patient(identity: str, **members: Any) -> dict[str, Any]:
    return {"resourceType": "Patient", "id": identity, **members}


@dataclass
class Upload:
    """The command ``fhir-assets upload`` with a home and an input folder of its own."""

    home: Path
    last: Result | None = field(default=None, init=False)

    @property
    def input(self) -> Path:
        return self.home / "input"

    @property
    def failures(self) -> Path:
        return self.home / "upload_failures.ndjson"

    def __call__(self, *options: str, url: str | None = None, exit_code: int = 0) -> dict[str, Any]:
        """Run the command and return its ``--json`` output. Errors of the project are raised."""
        app = typer.Typer()
        app.command()(upload_command)
        arguments = ["--input", str(self.input), *(["--url", url] if url else []), "--json", *options]
        self.last = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert self.last.exit_code == exit_code, self.last.output
        summary: dict[str, Any] = json.loads(self.last.stdout)
        return summary

    def refused(self) -> list[dict[str, Any]]:
        """Return the parsed lines of the failure file."""
        return [json.loads(line) for line in self.failures.read_text().splitlines()]


@pytest.fixture
def upload(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Upload:
    """Return the upload command with a home and a database of its own, which stores the dead letters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DB_URL", database)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    for name in ("FHIR_BASE_URL", "FHIR_SOURCE", "BATCH_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return Upload(tmp_path)


class _Entry(msgspec.Struct):
    resource: msgspec.Raw


class _Link(msgspec.Struct):
    relation: str
    url: str


class _Page(msgspec.Struct):
    link: list[_Link] = []
    entry: list[_Entry] = []


class _Head(msgspec.Struct, rename="camel"):
    resource_type: str
    id: str


def name_of(resource: bytes) -> str:
    """Return the ``Type/id`` of a resource."""
    head = msgspec.json.decode(resource, type=_Head)
    return f"{head.resource_type}/{head.id}"


def read_back(url: str, types: Iterable[str]) -> dict[str, bytes]:
    """Return all resources that a search of the server gives, as their exact bytes, by ``Type/id``."""
    resources: dict[str, bytes] = {}
    for name in types:
        page: str | None = f"{url}/{name}?_count=500"
        while page:
            bundle = msgspec.json.decode(requests.get(page, timeout=30).content, type=_Page)
            resources |= {name_of(bytes(entry.resource)): bytes(entry.resource) for entry in bundle.entry}
            page = next((link.url for link in bundle.link if link.relation == "next"), None)
    return resources


def lines_of(folder: Path) -> dict[str, bytes]:
    """Return the resources of a folder of NDJSON by ``Type/id``."""
    resources: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*.ndjson*")):
        content = path.read_bytes()
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()
        resources |= {name_of(line): line for line in lines}
    return resources


def assert_same(sent: Mapping[str, bytes], held: Mapping[str, bytes]) -> None:
    """Assert that the server has exactly the resources that were sent, with the same content."""
    assert sent.keys() == held.keys()
    assert [name for name, body in sent.items() if not has_same_content(body, held[name])] == []


class BatchResponder:
    """Handles requests with the statuses that two functions return. ``sent`` are the ids of each received batch.

    ``entry_status`` gets the id of an entry and how often it was received; ``batch_status`` gets the ids of a batch.
    """

    def __init__(
        self, entry_status: Callable[[str, int], int], batch_status: Callable[[list[str]], int] = lambda ids: 200
    ) -> None:
        self.sent: list[list[str]] = []
        self.times: Counter[str] = Counter()
        self._entry_status = entry_status
        self._batch_status = batch_status

    def __call__(self, request: ReceivedRequest) -> Reply:
        if request.method == "GET":
            return reply({"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"})
        ids = [entry["resource"]["id"] for entry in json.loads(request.body)["entry"]]
        self.sent.append(ids)
        if (status := self._batch_status(ids)) != 200:
            return reply({"resourceType": "OperationOutcome", "issue": [{"code": "too-long"}]}, status)
        entries = []
        for identity in ids:
            self.times[identity] += 1
            status = self._entry_status(identity, self.times[identity])
            etag = {"etag": 'W/"1"'} if status < 300 else {}
            entries.append({"response": {"status": str(status), **etag}})
        return reply({"resourceType": "Bundle", "type": "batch-response", "entry": entries})


class Claimant:
    """Answers every entry of a batch with status 200 and ``says``, and stores an entry when ``stores`` says so.

    ``stores`` gets how often the entry was received. Reads by a batch return what is stored.
    """

    def __init__(self, says: Resource, stores: Callable[[int], bool]) -> None:
        self.times: Counter[str] = Counter()
        self.stored: dict[str, Resource] = {}
        self._says = says
        self._stores = stores

    def __call__(self, request: ReceivedRequest) -> Reply:
        if request.method == "GET":
            return reply({"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"})
        entries = [self._answer(entry) for entry in json.loads(request.body)["entry"]]
        return reply({"resourceType": "Bundle", "type": "batch-response", "entry": entries})

    def _answer(self, entry: dict[str, Any]) -> dict[str, Any]:
        url = entry["request"]["url"]
        if entry["request"]["method"] == "GET":
            found = {"resource": self.stored[url]} if url in self.stored else {}
            return {**found, "response": {"status": "200" if found else "404"}}
        self.times[url] += 1
        if self._stores(self.times[url]):
            self.stored[url] = entry["resource"]
        return {"response": {"status": "200 OK", **self._says}}
