"""The source `search`, against a scripted server."""

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fhir_assets.errors import NotFhir, ServerRefused, ServerUnavailable
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.windows import Interval
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply
from fhir_assets_tests.support.search_bundles import DAY, NOW, build_search_source, bundle, patient, resource_ids

SECRET = "Mustermann"


def fetch(script: list[Reply], interval: Interval = DAY) -> list[Record | RejectedInput]:
    with ScriptedServer(script) as server:
        return list(build_search_source(server).fetch(["Patient"], interval))


def records(script: list[Reply], interval: Interval = DAY) -> list[Record]:
    items = fetch(script, interval)
    assert all(isinstance(item, Record) for item in items)
    return [item for item in items if isinstance(item, Record)]


class Paged:
    """A scripted server with pages of patients. It may ignore the sort order, and its next links may expire."""

    def __init__(
        self,
        patients: list[dict[str, Any]],
        size: int,
        *,
        sorts: bool = True,
        expires: Callable[[int], bool] = lambda pages: False,
        status: int = 410,
    ) -> None:
        self._patients = patients
        self._size = size
        self._sorts = sorts
        self._expires = expires
        self._status = status
        self._pages = 0
        self._matches: list[dict[str, Any]] = []

    def __call__(self, request: ReceivedRequest) -> Reply:
        at = 0
        if offset := request.all("_page"):
            self._pages += 1
            if self._expires(self._pages):
                return reply({"resourceType": "OperationOutcome"}, self._status)
            at = int(offset[0])
        else:
            bounds = {value[:2]: datetime.fromisoformat(value[2:]) for value in request.all("_lastUpdated")}
            self._matches = [p for p in self._patients if bounds["ge"] <= self._time(p) < bounds["lt"]]
            if self._sorts:
                self._matches.sort(key=self._time)
        end = at + self._size
        following = f"/fhir?_page={end}" if end < len(self._matches) else None
        return reply(bundle(self._matches[at:end], following))

    @staticmethod
    def _time(resource: dict[str, Any]) -> datetime:
        return datetime.fromisoformat(resource["meta"]["lastUpdated"])


def test_an_interval_is_requested_half_open_sorted_and_in_pages() -> None:
    with ScriptedServer([reply(bundle([]))] * 2) as server:
        source = build_search_source(server, page_size=250)
        list(source.fetch(["Patient"], DAY))
        list(source.fetch(["Patient"], Interval(None, DAY.end)))
        assert server.requests[0].path == "/fhir/Patient"
        assert server.requests[0].query == [
            ("_lastUpdated", "ge2024-01-01T00:00:00.000Z"),
            ("_lastUpdated", "lt2024-01-02T00:00:00.000Z"),
            ("_sort", "_lastUpdated"),
            ("_count", "250"),
        ]
        assert server.requests[1].all("_lastUpdated") == ["lt2024-01-02T00:00:00.000Z"]


def test_neighbouring_intervals_share_their_bound_to_the_millisecond() -> None:
    moment = datetime(2024, 1, 1, 12, 0, 0, 123_999, tzinfo=UTC)
    with ScriptedServer([reply(bundle([]))] * 2) as server:
        list(build_search_source(server).fetch(["Patient"], Interval(None, moment)))
        list(build_search_source(server).fetch(["Patient"], Interval(moment, DAY.end)))
        assert server.requests[0].all("_lastUpdated")[-1][2:] == server.requests[1].all("_lastUpdated")[0][2:]


def test_the_bytes_of_a_resource_are_kept_on_one_line() -> None:
    text = (
        '{ "resourceType":"Patient",\r\n "id":"a", "x":1.10,'
        '"meta":{"lastUpdated":"2024-01-01T01:00:00.5+01:00"},"ü":"\\u00fc"}'
    )
    body = b'{"entry":[{"resource":' + text.encode() + b'}],"resourceType":"Bundle","type":"searchset"}'
    (record,) = records([Reply(body)])
    assert record.body == text.replace("\r\n", "  ").encode()
    assert record.last_updated == datetime(2024, 1, 1, 0, 0, 0, 500_000, tzinfo=UTC)
    assert (record.resource_type, record.id, record.version_id, record.arrived) == ("Patient", "a", None, NOW)


def test_absolute_and_relative_next_links_are_followed_even_from_an_empty_page() -> None:
    pages: dict[str, dict[str, Any]] = {}

    def script(request: ReceivedRequest) -> Reply:
        return reply(pages["".join(request.all("page"))])

    with ScriptedServer(script) as server:
        pages[""] = bundle([patient(1)], f"{server.url}?page=2")
        pages["2"] = bundle([patient(2)], "?page=3")
        pages["3"] = {
            "resourceType": "Bundle",
            "type": "searchset",
            "link": bundle([], "/fhir/Patient?page=4")["link"],
        }
        pages["4"] = bundle([patient(4)])
        assert resource_ids(build_search_source(server).fetch(["Patient"], DAY)) == ["p1", "p2", "p4"]
        assert [request.path for request in server.requests] == ["/fhir/Patient", "/fhir", "/fhir", "/fhir/Patient"]


def test_a_link_to_another_origin_is_an_error_that_names_the_setting() -> None:
    script = [reply(bundle([patient(1)], f"http://internal.example:8080/fhir?name={SECRET}"))]
    with pytest.raises(NotFhir, match=r"http://internal.example:8080.*the base URL") as exc_info:
        fetch(script)
    assert SECRET not in str(exc_info.value)


def test_a_link_that_is_not_a_url_is_an_error() -> None:
    with pytest.raises(NotFhir, match="not a URL"):
        fetch([reply(bundle([patient(1)], "http://[broken"))])


def test_next_links_that_form_a_loop_are_an_error() -> None:
    script = [reply(bundle([patient(n)], f"?page={n % 2}")) for n in range(9)]
    with pytest.raises(NotFhir, match="form a loop"):
        fetch(script)


def test_endless_pages_without_new_resources_are_an_error() -> None:
    def script(request: ReceivedRequest) -> Reply:
        page = int((request.all("page") or ["0"])[0])
        return reply(bundle([patient(1)], f"?page={page + 1}"))

    with ScriptedServer(script) as server:
        with pytest.raises(NotFhir, match="no end"):
            list(build_search_source(server).fetch(["Patient"], DAY))


def test_a_version_is_returned_once_although_pages_repeat_it() -> None:
    script = [
        reply(bundle([patient(1), patient(2), patient(1)], "?page=2")),
        reply(bundle([patient(2), patient(2, version="2"), patient(3)], "?page=3")),
        reply(bundle([patient(1), patient(3), patient(4, version=None), patient(4, version=None)])),
    ]
    assert [(r.id, r.version_id) for r in records(script)] == [
        ("p1", "1"),
        ("p2", "1"),
        ("p2", "2"),
        ("p3", "1"),
        ("p4", None),
    ]


def test_outcomes_and_included_resources_are_not_matches() -> None:
    page = bundle([patient(1)])
    page["entry"] += [
        {"resource": {"resourceType": "OperationOutcome", "issue": []}, "search": {"mode": "outcome"}},
        {"resource": {"resourceType": "OperationOutcome", "issue": []}},
        {"resource": {"resourceType": "Practitioner", "id": "x"}, "search": {"mode": "include"}},
        {"resource": patient(2)},
    ]
    with ScriptedServer([reply(page)]) as server:
        source = build_search_source(server)
        assert resource_ids(source.fetch(["Patient"], DAY)) == ["p1", "p2"]
        assert source.included == {"Practitioner": 1}


@pytest.mark.parametrize(
    ("entry", "rule", "resource_id"),
    [
        ({"search": {"mode": "match"}}, "structure", None),
        ({"resource": None}, "structure", None),
        ({"resource": [SECRET]}, "structure", None),
        ({"resource": SECRET}, "structure", None),
        ({"resource": {}}, "structure", None),
        ({"resource": {"resourceType": "Patient", "name": SECRET}}, "structure", None),
        ({"resource": {"resourceType": "Patient", "id": ""}}, "structure", ""),
        ({"resource": {"resourceType": "Patient", "id": 5}}, "structure", None),
        ({"resource": {"resourceType": "Patient", "id": "a", "meta": [SECRET]}}, "structure", None),
        ({"resource": {"resourceType": SECRET, "id": "a"}}, "structure", "a"),
        (SECRET, "structure", None),
        (None, "structure", None),
        ({"resource": patient(1), "search": SECRET}, "structure", None),
    ],
)
def test_a_malformed_entry_is_rejected_and_the_other_entries_are_read(
    entry: object, rule: str, resource_id: str | None
) -> None:
    page = bundle([patient(1), patient(2)])
    page["entry"].insert(1, entry)
    items = fetch([reply(page)])
    assert [type(item) for item in items] == [Record, RejectedInput, Record]
    item = items[1]
    assert isinstance(item, RejectedInput)
    assert (item.resource_type, item.rule, item.resource_id) == ("Patient", rule, resource_id)
    assert item.path == "Patient search, page 1, entry 2"
    assert SECRET not in item.message


@pytest.mark.parametrize(
    "body",
    [
        {"resourceType": "OperationOutcome", "issue": [{"diagnostics": SECRET}]},
        {"resourceType": "Bundle", "type": "history", "entry": []},
        {"resourceType": "Patient", "id": SECRET},
        {"resourceType": "Bundle", "type": "searchset", "entry": {"resource": SECRET}},
        {"status": "ok"},
        [SECRET],
        SECRET,
        None,
    ],
)
def test_a_body_other_than_a_searchset_is_an_error_and_not_an_empty_page(body: object) -> None:
    with pytest.raises(NotFhir) as exc_info:
        fetch([reply(body)] * 3)
    assert SECRET not in str(exc_info.value)


def test_a_body_that_is_truncated_on_every_attempt_is_an_error() -> None:
    cut = json.dumps(bundle([patient(1)])).encode()[:-5]
    with pytest.raises(NotFhir, match=r"incomplete JSON \(tried 3 times"):
        fetch([Reply(cut)] * 3)


def test_records_before_an_error_are_returned() -> None:
    with ScriptedServer([reply(bundle([patient(1)], "?page=2")), *[Reply(status=500)] * 3]) as server:
        items = build_search_source(server).fetch(["Patient"], DAY)
        assert resource_ids([next(items)]) == ["p1"]
        with pytest.raises(ServerUnavailable):
            next(items)


def test_the_next_page_is_requested_while_a_page_is_processed() -> None:
    second = threading.Event()

    def script(request: ReceivedRequest) -> Reply:
        if request.all("page"):
            second.set()
            return reply(bundle([patient(2)]))
        return reply(bundle([patient(1)], "?page=2"))

    with ScriptedServer(script) as server:
        items = build_search_source(server).fetch(["Patient"], DAY)
        first = next(items)
        assert second.wait(10)
        assert resource_ids([first, *items]) == ["p1", "p2"]


@pytest.mark.parametrize("status", [410, 404])
@pytest.mark.parametrize("sorts", [True, False])
def test_an_expired_page_restarts_the_search_and_no_resource_is_lost_or_repeated(status: int, sorts: bool) -> None:
    patients = [patient(n * 7 % 200) for n in range(200)]
    script = Paged(patients, 15, sorts=sorts, expires=lambda pages: pages in (4, 15), status=status)
    with ScriptedServer(script) as server:
        received_ids = resource_ids(build_search_source(server).fetch(["Patient"], DAY))
        searches = [request for request in server.requests if request.all("_count") == ["500"]]
        starts = [search.all("_lastUpdated")[0] for search in searches]
    assert len(received_ids) == 200
    assert set(received_ids) == {p["id"] for p in patients}
    assert len(starts) > 1
    assert (starts == sorted(set(starts))) is sorts


def test_pages_that_always_expire_are_an_error() -> None:
    at = datetime(2024, 1, 1, 5, tzinfo=UTC)
    script = Paged([patient(n, at=at) for n in range(20)], 5, expires=lambda pages: pages % 2 == 0)
    with ScriptedServer(script) as server:
        with pytest.raises(ServerUnavailable, match="the page size"):
            list(build_search_source(server).fetch(["Patient"], DAY))


def test_the_page_size_is_no_advice_if_already_the_first_next_link_leads_to_nothing() -> None:
    script = Paged([patient(n) for n in range(20)], 5, expires=lambda pages: True, status=404)
    with ScriptedServer(script) as server:
        with pytest.raises(ServerUnavailable, match="paging is broken") as caught:
            list(build_search_source(server).fetch(["Patient"], DAY))
    assert "the page size" not in str(caught.value)


def test_a_refused_first_page_does_not_count_as_expired() -> None:
    with pytest.raises(ServerRefused, match="410"):
        fetch([Reply(status=410)])
    with pytest.raises(ServerRefused, match="400"):
        fetch([reply(bundle([patient(1)], "?page=2")), Reply(status=400)])


@pytest.mark.parametrize("moment", [datetime(2023, 12, 31, 12, tzinfo=UTC), datetime(2024, 1, 3, tzinfo=UTC)])
def test_a_server_that_ignores_last_updated_is_an_error(moment: datetime) -> None:
    with pytest.raises(NotFhir, match="_lastUpdated"):
        fetch([reply(bundle([patient(1, at=moment)]), Date="Sat, 01 Jun 2024 00:00:00 GMT")])


@pytest.mark.parametrize(
    ("headers", "began"),
    [({}, NOW), ({"Date": "Fri, 01 Mar 2024 00:00:00 GMT"}, datetime(2024, 3, 1, tzinfo=UTC))],
)
def test_a_resource_updated_while_the_search_runs_is_left_to_the_next_one(
    headers: dict[str, str], began: datetime
) -> None:
    page = bundle([patient(1), patient(2, at=began + timedelta(seconds=3)), patient(3)])
    assert resource_ids(records([Reply(json.dumps(page).encode(), headers=headers)])) == ["p1", "p3"]


def test_a_resource_without_last_updated_is_kept() -> None:
    (record,) = records([reply(bundle([{"resourceType": "Patient", "id": "a"}]))])
    assert (record.last_updated, record.as_of) == (None, NOW)
