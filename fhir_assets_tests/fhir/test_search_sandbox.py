"""The source `search` against the sandbox server: it returns the same resources with and without faults."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from fhir_assets.catalog import CATALOG
from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.auth.credentials import Credentials, build_credentials
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.files.ndjson import NdjsonSource
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets.sandbox.fault_injection import Credentials as Expected
from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.windows import Interval

START = datetime(2024, 1, 1, tzinfo=UTC)
ALWAYS = Interval(None, datetime(2025, 1, 1, tzinfo=UTC))
TYPES = tuple(resource_type.name for resource_type in CATALOG)
SYNTHEA = Path(__file__).resolve().parents[2].parent / "shared/data/synthea"

FAULTS = {
    FaultKind.THROTTLE: Fault(kind=FaultKind.THROTTLE, every=5, retry_after=3, retry_after_date=True),
    FaultKind.ERROR: Fault(kind=FaultKind.ERROR, every=7, status=503),
    FaultKind.RESET: Fault(kind=FaultKind.RESET, every=11),
    FaultKind.DROP: Fault(kind=FaultKind.DROP, every=6),
    FaultKind.TRUNCATE: Fault(kind=FaultKind.TRUNCATE, every=9),
    FaultKind.HTML: Fault(kind=FaultKind.HTML, every=13),
    FaultKind.EXPIRE: Fault(kind=FaultKind.EXPIRE, every=4),
    FaultKind.DUPLICATE: Fault(kind=FaultKind.DUPLICATE, every=3),
}


def body(n: int) -> bytes:
    """Return an Observation. Three consecutive Observations have the same ``lastUpdated``."""
    moment = (START + timedelta(minutes=n // 3)).isoformat()
    return f'{{"resourceType":"Observation","id":"o{n}","meta":{{"lastUpdated":"{moment}"}},"x":{n}.50}}'.encode()


def build_source(server: SandboxServer, *, page_size: int = 40, auth: Credentials | None = None) -> SearchSource:
    retrier = Retrier(RetryPolicy(), sleep=lambda seconds: None)
    return SearchSource(FhirClient(server.url, credentials=auth, retrier=retrier), page_size=page_size)


def by_key(items: Iterable[Record | RejectedInput]) -> dict[tuple[str, str], bytes]:
    """Return the bodies by type and id. Fails if a resource is repeated."""
    bodies: dict[tuple[str, str], bytes] = {}
    for item in items:
        assert isinstance(item, Record)
        assert (item.resource_type, item.id) not in bodies
        bodies[item.resource_type, item.id] = item.body
    return bodies


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([body(n) for n in range(1000)]) as running:
        yield running


@pytest.mark.parametrize("kinds", [*((kind,) for kind in FAULTS), tuple(FAULTS)], ids="+".join)
def test_no_fault_loses_repeats_or_changes_a_resource(server: SandboxServer, kinds: tuple[FaultKind, ...]) -> None:
    server.set_faults(*(FAULTS[kind] for kind in kinds))
    received = by_key(build_source(server).fetch(["Observation"], ALWAYS))
    assert received == by_key(Record("Observation", f"o{n}", None, None, START, body(n)) for n in range(1000))
    assert set(server.stats()["struck"]) == set(kinds)


def test_neighbouring_intervals_overlap_nowhere_and_miss_nothing(server: SandboxServer) -> None:
    source = build_source(server)
    bounds = [START + timedelta(minutes=m) for m in (0, 7, 100, 101, 500)]
    intervals = [Interval(low, high) for low, high in pairwise(bounds)]
    received = [item for interval in intervals for item in source.fetch(["Observation"], interval)]
    assert by_key(received).keys() == {("Observation", f"o{n}") for n in range(1000)}
    assert [source.count("Observation", interval) for interval in intervals] == [21, 279, 3, 697]


def test_a_lost_page_is_visible_in_the_count(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.LOSE_PAGE, every=3, times=1))
    source = build_source(server)
    received = by_key(source.fetch(["Observation"], ALWAYS))
    assert source.count("Observation", ALWAYS) == 1000
    assert len(received) == 960


def test_the_extent_of_a_server_contains_all_of_its_resources(server: SandboxServer) -> None:
    extent = build_source(server).find_extent(["Patient", "Observation"])
    assert extent is not None
    assert extent.start == START
    assert extent.end > START + timedelta(minutes=333)
    assert build_source(server).find_extent(["Patient"]) is None


def test_resources_are_fetched_by_id(server: SandboxServer) -> None:
    wanted = [f"o{n}" for n in range(0, 2000, 10)]
    received = by_key(build_source(server, page_size=7).fetch_ids("Observation", wanted))
    assert received.keys() == {("Observation", f"o{n}") for n in range(0, 1000, 10)}


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        (
            Expected(username="anna", password="secret"),
            build_credentials("anna", "secret"),
            build_credentials("anna", "other"),
        ),
        (Expected(token="secret"), build_credentials(token="secret"), build_credentials(token="other")),
    ],
)
def test_only_the_right_credentials_are_accepted(expected: Expected, right: Credentials, wrong: Credentials) -> None:
    with SandboxServer([body(1)], credentials=expected) as server:
        assert len(list(build_source(server, auth=right).fetch(["Observation"], ALWAYS))) == 1
        for auth in (wrong, None):
            source = build_source(server, auth=auth)
            with pytest.raises(ServerRefused, match=r"the token|the password"):
                source.count("Observation", ALWAYS)


@pytest.mark.skipif(not SYNTHEA.exists(), reason="the shared data is not here")
def test_search_and_files_return_the_same_resources() -> None:
    with SandboxServer(SYNTHEA, faults=tuple(FAULTS.values())) as server:
        searched = by_key(build_source(server, page_size=100).fetch(TYPES, ALWAYS))
    assert searched == by_key(NdjsonSource(str(SYNTHEA)).fetch(TYPES, ALWAYS))
    assert len(searched) == 8421
