"""Real data served by the sandbox. The tests are skipped if the shared folder is absent."""

import gzip
from pathlib import Path

import msgspec
import pytest
import requests

from fhir_assets.sandbox.process import SandboxServer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")


class Entry(msgspec.Struct):
    resource: msgspec.Raw


class Link(msgspec.Struct):
    relation: str
    url: str


class Bundle(msgspec.Struct):
    link: list[Link]
    entry: list[Entry]


@pytest.mark.parametrize(("folder", "count"), [("synthea", 8421), ("r4-examples", 370)])
def test_every_resource_is_served_once_with_the_bytes_of_its_file(folder: str, count: int) -> None:
    lines = [
        line.strip()
        for path in (DATA / folder).glob("*.ndjson.gz")
        for line in gzip.decompress(path.read_bytes()).splitlines()
        if line.strip()
    ]
    assert len(lines) == count
    served = []
    with SandboxServer(DATA / folder) as server:
        for name in server.stats()["resources"]:
            url: str | None = f"{server.url}/{name}?_count=500"
            while url:
                bundle = msgspec.json.decode(requests.get(url, timeout=30).content, type=Bundle)
                served += [bytes(entry.resource) for entry in bundle.entry]
                url = next((link.url for link in bundle.link if link.relation == "next"), None)
    assert sorted(served) == sorted(lines)
