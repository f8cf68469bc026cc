"""Real data, served whole. Skipped where the shared folder is absent."""

import gzip
from pathlib import Path

import pytest
import requests

from fhir_assets.sandbox.process import SandboxServer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")


@pytest.mark.parametrize(("folder", "count"), [("synthea", 8421), ("r4-examples", 370)])
def test_every_resource_is_served_once_with_the_bytes_of_its_file(folder: str, count: int) -> None:
    lines = [
        line.strip()
        for path in sorted((DATA / folder).glob("*.ndjson.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
        if line.strip()
    ]
    assert len(lines) == count
    with SandboxServer(DATA / folder) as server:
        pages = []
        for name in server.stats()["resources"]:
            url: str | None = f"{server.url}/{name}?_count=500"
            while url:
                answer = requests.get(url, timeout=30)
                pages.append(answer.content)
                url = next((k["url"] for k in answer.json()["link"] if k["relation"] == "next"), None)
    assert sum(page.count(b'"search":{"mode":"match"}') for page in pages) == count
    assert all(b'"resource":' + line + b',"search"' in page_of(line, pages) for line in lines)


def page_of(line: bytes, pages: list[bytes]) -> bytes:
    """The page that holds a resource, or nothing."""
    return next((page for page in pages if line in page), b"")
