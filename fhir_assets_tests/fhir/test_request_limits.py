"""The limits of one request: its pages, its files, its lines. Each error names the setting."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.bulk.file_lines import LONG_LINE, split_file
from fhir_assets.fhir.bulk.manifest import parse_manifest
from fhir_assets.fhir.bulk.manifest_parts import ManifestParts
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.limits import ClientLimits
from fhir_assets.fhir.search.history import DeletionHistory
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply
from fhir_assets_tests.support.search_bundles import DAY, NOW, bundle, patient

LIMITS = ClientLimits(max_pages=5, max_files=5, answer_bytes=1 << 16)


def endless_pages(**members: object) -> Callable[[ReceivedRequest], Reply]:
    """Return a script of a server that has a new resource and a new page after every page."""

    def answer(request: ReceivedRequest) -> Reply:
        number = int(dict(request.query).get("page", 0))
        return reply(bundle([patient(number)], f"/fhir/Patient?page={number + 1}", **members))

    return answer


def test_a_search_whose_pages_have_no_end_is_given_up() -> None:
    with ScriptedServer(endless_pages()) as server:
        source = SearchSource(FhirClient(server.url, limits=LIMITS), now=lambda: NOW)
        with pytest.raises(NotFhir, match=r"search of Patient has more than 5 pages.* the limit of pages allows"):
            list(source.fetch(["Patient"], DAY))
        assert len(server.requests) <= 6


def test_a_search_that_expires_again_and_again_is_given_up_although_it_gets_further() -> None:
    def answer(request: ReceivedRequest) -> Reply:
        if "page" in dict(request.query):
            return Reply(status=410)
        number = len(server.requests)
        return reply(bundle([patient(number)], f"/fhir/Patient?page={number}"))

    with ScriptedServer(answer) as server:
        source = SearchSource(FhirClient(server.url, limits=LIMITS), now=lambda: NOW)
        with pytest.raises(NotFhir, match="more than 5 pages"):
            list(source.fetch(["Patient"], DAY))


def test_a_history_whose_pages_have_no_end_is_given_up() -> None:
    with ScriptedServer(endless_pages(type="history")) as server:
        history = DeletionHistory(FhirClient(server.url, limits=LIMITS))
        with pytest.raises(NotFhir, match=r"history of Patient has more than 5 pages.* the limit of pages allows"):
            list(history.fetch_since("Patient", datetime(2024, 1, 1, tzinfo=UTC)))


def manifest(*urls: str) -> dict[str, object]:
    output = [{"type": "Patient", "url": url} for url in urls]
    return {"transactionTime": "2024-01-05T00:00:00Z", "requiresAccessToken": False, "output": output}


def test_a_manifest_with_more_files_than_the_limit_is_refused() -> None:
    parts = ManifestParts(LIMITS)
    files = [f"/{n}" for n in range(3)]
    parts.add("u1", parse_manifest(manifest(*files), "http://fhir.example/1"))
    with pytest.raises(NotFhir, match=r"more than 5 files.* the limit of files of an export allows"):
        parts.add("u2", parse_manifest(manifest(*files), "http://fhir.example/2"))


def test_a_manifest_whose_parts_have_no_end_is_refused_even_if_they_are_empty() -> None:
    parts = ManifestParts(LIMITS)
    for number in range(5):
        parts.add(f"u{number}", parse_manifest(manifest(), "http://fhir.example/1"))
    with pytest.raises(NotFhir, match="more than 5 files"):
        parts.add("u5", parse_manifest(manifest(), "http://fhir.example/1"))


def test_a_manifest_whose_parts_link_to_each_other_is_refused() -> None:
    parts = ManifestParts(LIMITS)
    parts.add("u1", parse_manifest(manifest(), "http://fhir.example/1"))
    with pytest.raises(NotFhir, match="in a loop"):
        parts.add("u1", parse_manifest(manifest(), "http://fhir.example/1"))


def test_a_manifest_that_is_larger_than_an_answer_in_all_its_parts_is_refused() -> None:
    parts = ManifestParts(LIMITS)
    parts.add("u1", parse_manifest(manifest("/" + "a" * 40_000), "http://fhir.example/1"))
    with pytest.raises(NotFhir, match="the size limit of an answer"):
        parts.add("u2", parse_manifest(manifest("/" + "a" * 40_000), "http://fhir.example/1"))


@pytest.mark.parametrize("url", ["/\0", "/\ud800", "/\x1b[2J", "http://[bad", "ftp://files.example/1"])
def test_a_manifest_whose_addresses_cannot_be_stored_is_refused(url: str) -> None:
    with pytest.raises(NotFhir, match="not a Bulk Data manifest"):
        parse_manifest(manifest(url), "http://fhir.example/1")


@pytest.mark.parametrize("count", [float("inf"), "9" * 5000, [1]])
def test_a_manifest_with_a_count_that_is_no_number_is_refused(count: object) -> None:
    document = manifest()
    document["output"] = [{"type": "Patient", "url": "/1", "count": count}]
    with pytest.raises(NotFhir, match="not a Bulk Data manifest"):
        parse_manifest(document, "http://fhir.example/1")


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    return (content[start : start + size] for start in range(0, len(content), size))


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("end", [b"\n", b""], ids=["line-feed", "no-line-feed"])
def test_a_line_that_is_too_long_is_replaced_and_no_other_is(size: int, end: bytes) -> None:
    short, long = b'{"a":1}', b'{"a":"' + b"x" * 200 + b'"}'
    content = b"\n".join([short, long, b"", short, long]) + end
    lines = [line for batch in split_file(pieces(content, size), 100) for line in batch]
    assert lines == [short, LONG_LINE, short, LONG_LINE]


def test_a_line_without_end_needs_no_memory() -> None:
    kept: list[bytes] = []

    def chunks() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 100_000
        yield b"\n{}"

    for batch in split_file(chunks(), 1000):
        kept += batch
    assert kept == [LONG_LINE, b"{}"]
