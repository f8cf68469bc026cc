"""The source `search`: counts, offered types, ids and extents, against a scripted server."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fhir_assets.errors import NotFhir, ServerRefused
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.windows import Interval
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply
from fhir_assets_tests.support.search_bundles import DAY, NOW, build_search_source, bundle, patient, resource_ids

SECRET = "Mustermann"


def test_count_is_the_total_of_the_server() -> None:
    with ScriptedServer([reply(bundle([], total=42)), *[reply(bundle([]))] * 2]) as server:
        source = build_search_source(server)
        assert source.count("Patient", DAY) == 42
        assert source.count("Patient", DAY) is None
        assert server.requests[0].all("_summary") == ["count"]
        assert len(server.requests[0].all("_lastUpdated")) == 2


@pytest.mark.parametrize("status", [400, 422, 501])
def test_count_is_unknown_if_the_server_cannot_count(status: int) -> None:
    with ScriptedServer([reply({}, status)] * 2) as server:
        source = build_search_source(server)
        assert source.count("Patient", DAY) is None
        assert source.count("Patient", DAY) is None
        assert [notice.code for notice in source.drain_notices()] == ["no-totals"]


def test_a_server_that_refuses_the_user_is_an_error_and_not_an_unknown_count() -> None:
    with ScriptedServer([reply({}, 403)]) as server, pytest.raises(ServerRefused):
        build_search_source(server).count("Patient", DAY)


def statement_of(*types: str) -> dict[str, Any]:
    resources = [{"type": name, "interaction": [{"code": "search-type"}]} for name in types]
    return {"resourceType": "CapabilityStatement", "rest": [{"mode": "server", "resource": resources}]}


def test_offered_types_are_requested_again_only_after_ten_minutes() -> None:
    moment = NOW
    with ScriptedServer([reply(statement_of("Patient")), reply(statement_of("Goal"))]) as server:
        source = SearchSource(FhirClient(server.url, timeout=10), now=lambda: moment)
        assert source.list_types() == source.list_types() == frozenset({"Patient"})
        moment += timedelta(minutes=11)
        assert source.list_types() == frozenset({"Goal"})


def test_capabilities_without_types_are_not_requested_repeatedly() -> None:
    with ScriptedServer([reply(statement_of())]) as server:
        source = build_search_source(server)
        assert source.list_types() is None
        assert source.list_types() is None


def test_valid_ids_are_requested_in_batches() -> None:
    def script(request: ReceivedRequest) -> Reply:
        (wanted,) = request.all("_id")
        return reply(bundle(patient(int(id_[1:])) for id_ in wanted.split(",") if int(id_[1:]) % 2))

    with ScriptedServer(script) as server:
        wanted = [*(f"p{n}" for n in range(120)), "p1", "a,b", "ä", "", "x" * 65]
        received_ids = resource_ids(build_search_source(server).fetch_ids("Patient", wanted))
        assert received_ids == [f"p{n}" for n in range(1, 120, 2)]
        assert [len(request.all("_id")[0].split(",")) for request in server.requests] == [50, 50, 20]


def test_a_server_that_ignores_ids_is_an_error() -> None:
    with ScriptedServer([reply(bundle([patient(1), patient(2)]))]) as server:
        with pytest.raises(NotFhir, match="_id"):
            list(build_search_source(server).fetch_ids("Patient", ["p1"]))


def _extent(script: Callable[[ReceivedRequest], Reply]) -> Interval | None:
    with ScriptedServer(script) as server:
        return build_search_source(server).find_extent(["Patient"])


def _sorting(patients: list[dict[str, Any]], *, sorts: bool = True) -> Callable[[ReceivedRequest], Reply]:
    def script(request: ReceivedRequest) -> Reply:
        matches = patients
        for value in request.all("_lastUpdated"):
            bound = datetime.fromisoformat(value[2:])
            low = value.startswith("ge")
            matches = [p for p in matches if "meta" not in p or (_time(p) >= bound if low else _time(p) < bound)]
        if sorts and (order := request.all("_sort")):
            matches = sorted(matches, key=_time, reverse=order[0].startswith("-"))
        return reply(bundle([] if request.all("_summary") else matches[:1], total=len(matches)))

    return script


def _time(resource: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(resource["meta"]["lastUpdated"])


def test_extent_goes_from_the_oldest_to_now() -> None:
    extent = _extent(_sorting([patient(5), patient(1), patient(9)]))
    assert extent is not None
    assert extent.start == datetime(2024, 1, 1, 0, 1, tzinfo=UTC)
    assert extent.end == NOW


def test_the_oldest_resource_is_searched_by_bisection_if_the_server_ignores_or_refuses_to_sort() -> None:
    unsorted = _sorting([patient(5), patient(1), patient(9)], sorts=False)
    refusing = Reply(status=400)
    for script in (unsorted, lambda request: refusing if request.all("_sort") else unsorted(request)):
        with ScriptedServer(script) as server:
            source = build_search_source(server)
            extent = source.find_extent(["Patient"])
            assert [notice.severity for notice in source.drain_notices()] == ["warning"]
        assert extent is not None
        assert extent.start is not None
        assert datetime(2023, 12, 31, 23, tzinfo=UTC) < extent.start <= datetime(2024, 1, 1, 0, 1, tzinfo=UTC)
        assert extent.end == NOW


def test_the_extent_has_no_start_if_the_oldest_resource_cannot_be_found() -> None:
    ignoring = Reply(json.dumps(bundle([patient(5)])).encode())
    assert _extent(lambda request: ignoring) == Interval(None, NOW)
    undated = _sorting([{"resourceType": "Patient", "id": "a"}, patient(5)], sorts=False)
    assert _extent(undated) == Interval(None, NOW)
    refusing = Reply(status=400)
    assert _extent(lambda request: refusing if request.all("_lastUpdated") else ignoring) == Interval(None, NOW)


def test_the_extent_of_an_empty_server_is_none_and_an_extent_into_the_future_ends_now() -> None:
    assert _extent(_sorting([])) is None
    extent = _extent(_sorting([patient(1), patient(2, at=NOW + timedelta(days=9000))]))
    assert extent == Interval(datetime(2024, 1, 1, 0, 1, tzinfo=UTC), NOW)


def test_the_extent_has_no_start_if_the_first_pages_are_empty_but_the_total_is_not_zero() -> None:
    def script(request: ReceivedRequest) -> Reply:
        return reply(bundle([], None if request.all("_summary") else "Patient?page=2", total=7))

    with ScriptedServer(script) as server:
        assert build_search_source(server).find_extent(["Patient"]) == Interval(None, NOW)


@pytest.mark.parametrize("newest", ["9999-12-31T23:59:59.999999Z", "2024-07-01T00:00:00Z"])
def test_a_resource_dated_in_the_future_does_not_end_the_extent(newest: str) -> None:
    def script(request: ReceivedRequest) -> Reply:
        if request.all("_summary"):
            return reply(bundle([], total=2))
        resource = patient(1)
        if request.all("_sort") == ["-_lastUpdated"]:
            resource["meta"]["lastUpdated"] = newest
        return reply(bundle([resource]))

    with ScriptedServer(script) as server:
        extent = build_search_source(server).find_extent(["Patient"])
        assert extent
        assert extent.end == NOW
