"""Parameters that a server refuses or ignores: the search does without them, and says so once."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from fhir_assets.errors import ServerRefused
from fhir_assets.fhir.record import Record
from fhir_assets.windows import Interval
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply
from fhir_assets_tests.support.search_bundles import NOW, build_search_source, resource_ids
from fhir_assets_tests.support.search_server import SearchServer, outcome, resource

YEAR = Interval(datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC))
PATIENTS = [resource("Patient", f"p{n:02}", f"2024-03-{31 - n:02}T10:00:00Z") for n in range(30)]
IDS = sorted(item["id"] for item in PATIENTS)


def _refusing(refuses: Callable[[ReceivedRequest], bool], status: int = 400) -> SearchServer:
    def answer(request: ReceivedRequest, path: str) -> Reply | None:
        return outcome(status) if path in ("Patient", "Observation") and refuses(request) else None

    return SearchServer(PATIENTS, types=("Patient", "Observation"), answer=answer)


@pytest.mark.parametrize("status", [400, 422, 500, 501])
def test_a_server_that_refuses_sort_is_read_unsorted(status: int) -> None:
    with _refusing(lambda request: bool(request.all("_sort")), status) as server:
        source = build_search_source(server, page_size=7)
        for _ in range(2):
            assert sorted(resource_ids(source.fetch(["Patient"], YEAR))) == IDS
        refused = [request for request in server.searches("Patient") if request.all("_sort")]
        assert len(refused) == (3 if status == 500 else 1)
        assert all(request.all("_count") == ["7"] for request in refused)
        assert [notice.code for notice in source.drain_notices()] == ["sort-refuses"]


def test_a_page_size_above_the_maximum_of_the_server_is_halved_and_asked_for_once() -> None:
    def refuses(request: ReceivedRequest) -> bool:
        return any(int(count) > 100 for count in request.all("_count"))

    with _refusing(refuses) as server:
        source = build_search_source(server, page_size=500)
        assert sorted(resource_ids(source.fetch(["Patient"], YEAR))) == IDS
        before = len(server.requests)
        assert list(source.fetch(["Observation"], YEAR)) == []
        (search,) = server.requests[before:]
        assert (search.all("_count"), search.all("_sort")) == (["62"], ["_lastUpdated"])
        (notice,) = source.drain_notices()
        assert "refuses pages of 500 resources: it is asked for 62; set the page size" in notice.message


def test_a_server_that_refuses_count_and_sort_is_read_in_pages_of_its_own_size() -> None:
    with _refusing(lambda request: bool(request.all("_sort") or request.all("_count"))) as server:
        source = build_search_source(server)
        assert sorted(resource_ids(source.fetch(["Patient"], YEAR))) == IDS
        extent = source.find_extent(["Patient"])
        assert extent is not None
        assert extent.start is not None
        assert extent.start <= datetime(2024, 3, 2, 10, tzinfo=UTC)
        assert {notice.code for notice in source.drain_notices()} == {"sort-refuses", "page-size"}


@pytest.mark.parametrize("refused", [("_count",), ("_sort", "_count")])
def test_the_extent_is_found_at_a_server_that_refuses_count(refused: tuple[str, ...]) -> None:
    with _refusing(lambda request: any(request.all(name) for name in refused)) as server:
        extent = build_search_source(server).find_extent(["Patient"])
    assert extent is not None
    assert extent.start is not None
    assert extent.start <= datetime(2024, 3, 2, 10, tzinfo=UTC)


def test_a_refused_search_is_an_error_after_one_attempt_without_parameters() -> None:
    with _refusing(lambda request: True) as server:
        source = build_search_source(server)
        with pytest.raises(ServerRefused, match="400"):
            list(source.fetch(["Patient"], YEAR))
        assert len(server.searches("Patient")) == 2
        assert source.drain_notices() == ()


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_refuses_summary_is_counted_by_total(status: int) -> None:
    with _refusing(lambda request: bool(request.all("_summary")), status) as server:
        source = build_search_source(server)
        assert source.count("Patient", YEAR) == 30
        before = len(server.requests)
        assert source.count("Patient", YEAR) == 30
        (count,) = server.requests[before:]
        assert (count.all("_total"), count.all("_count")) == (["accurate"], ["1"])
        assert source.drain_notices() == ()


def test_a_refused_count_without_a_filter_leaves_the_counts_of_windows() -> None:
    with _refusing(lambda request: not request.all("_lastUpdated")) as server:
        source = build_search_source(server)
        assert source.count_undated("Patient") is None
        assert source.count("Patient", YEAR) == 30


def test_an_unknown_total_is_a_warning_once_and_no_equal_count() -> None:
    def bend(page: dict[str, Any], request: ReceivedRequest) -> None:
        del page["total"]

    with SearchServer(PATIENTS, bend=bend) as server:
        source = build_search_source(server)
        assert [source.count("Patient", YEAR) for _ in range(3)] == [None] * 3
        (notice,) = source.drain_notices()
        assert (notice.code, notice.severity) == ("no-totals", "warning")
        assert source.find_extent(["Patient"]) == Interval(datetime(2024, 3, 2, 10, tzinfo=UTC), NOW)


def test_a_server_that_ignores_sort_is_noticed_once_and_asked_no_more() -> None:
    def bend(page: dict[str, Any], request: ReceivedRequest) -> None:
        page.get("entry", []).reverse()

    with SearchServer(PATIENTS, bend=bend) as server:
        source = build_search_source(server)
        for _ in range(2):
            assert sorted(resource_ids(source.fetch(["Patient"], YEAR))) == IDS
        assert [bool(request.all("_sort")) for request in server.searches("Patient")] == [True, False]
        assert [notice.code for notice in source.drain_notices()] == ["sort-ignores"]


def test_one_refused_type_leaves_the_extent_of_the_others_known() -> None:
    def answer(request: ReceivedRequest, path: str) -> Reply | None:
        return outcome(400) if path == "Observation" and request.all("_lastUpdated") else None

    resources = [*PATIENTS, resource("Observation", "o")]
    with SearchServer(resources, types=("Patient", "Observation"), answer=answer) as server:
        source = build_search_source(server)
        assert source.find_extent(["Patient"]) == Interval(datetime(2024, 3, 2, 10, tzinfo=UTC), NOW)
        assert source.find_extent(["Observation"]) == Interval(None, NOW)


def test_versions_that_the_server_neither_numbers_nor_dates_are_told_apart_by_their_content() -> None:
    undated = [
        resource("Patient", "a", None, gender="male"),
        resource("Patient", "a", None, gender="female"),
        resource("Patient", "a", None, gender="male"),
    ]
    with SearchServer(undated) as server:
        items = list(build_search_source(server).fetch(["Patient"], YEAR))
    bodies = [item.body for item in items if isinstance(item, Record)]
    assert len(items) == len(bodies) == len(set(bodies)) == 2
