"""Answers of a search whose envelope is not as R4 has it, that say they are incomplete, or that come from a cache."""

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply
from fhir_assets_tests.support.search_bundles import DAY, build_search_source, bundle, patient, resource_ids

SECRET = "Mustermann"


@pytest.mark.parametrize(
    "envelope",
    [
        {"type": None},
        {"total": "2"},
        {"total": 2.0},
        {"total": None},
        {"total": "about 2"},
        {"total": {"value": 2}},
        {"link": None},
        {"link": [None, {"relation": "self", "url": None}, {"relation": None, "url": "x"}]},
        {"link": {"relation": "self", "url": "x"}},
        {"meta": None, "timestamp": None, "signature": None},
    ],
)
def test_an_envelope_is_read_leniently(envelope: dict[str, Any]) -> None:
    page = bundle([patient(1), patient(2)], **envelope)
    page = {name: value for name, value in page.items() if name != "type" or value}
    with ScriptedServer([reply(page)]) as server:
        assert resource_ids(build_search_source(server).fetch(["Patient"], DAY)) == ["p1", "p2"]


@pytest.mark.parametrize(
    ("total", "count"), [("3", 3), (3.0, 3), (" 3 ", 3), (3, 3), (-1, None), (3.5, None), ("x", None), (True, None)]
)
def test_a_total_is_a_number_or_a_text_of_digits_and_otherwise_unknown(total: object, count: int | None) -> None:
    with ScriptedServer(lambda request: reply(bundle([], total=total))) as server:
        assert build_search_source(server).count("Patient", DAY) == count


def test_half_a_surrogate_pair_makes_one_resource_invalid_and_not_the_page() -> None:
    cut_off = {**patient(1), "text": {"div": "\ud83d\ude00 \\ud83d \ud83d"}}
    with ScriptedServer([reply(bundle([cut_off, patient(2), patient(3)]))]) as server:
        items = list(build_search_source(server).fetch(["Patient"], DAY))
    assert resource_ids(item for item in items if isinstance(item, Record)) == ["p2", "p3"]
    [rejected] = [item for item in items if isinstance(item, RejectedInput)]
    assert "surrogate" in rejected.message
    assert b"\\ud83d\\ude00" in rejected.body


def test_a_page_with_entry_null_is_empty() -> None:
    page = {"resourceType": "Bundle", "type": "searchset", "entry": None}
    with ScriptedServer([reply(page)]) as server:
        assert list(build_search_source(server).fetch(["Patient"], DAY)) == []


@pytest.mark.parametrize(
    "encode",
    [
        lambda body: b"\xef\xbb\xbf" + body,
        lambda body: gzip.compress(body),
        lambda body: gzip.compress(body[:50]) + gzip.compress(body[50:]),
        lambda body: gzip.compress(b"\xef\xbb\xbf" + body),
    ],
    ids=["byte order mark", "undeclared gzip", "two members", "both"],
)
def test_a_body_is_read_with_a_byte_order_mark_and_as_undeclared_gzip(encode: Callable[[bytes], bytes]) -> None:
    statement = {"resourceType": "CapabilityStatement", "rest": [{"resource": [{"type": "Patient"}]}]}

    def script(request: ReceivedRequest) -> Reply:
        page = statement if request.path.endswith("metadata") else bundle([patient(1)], total=1)
        return Reply(encode(json.dumps(page).encode()))

    with ScriptedServer(script) as server:
        source = build_search_source(server)
        assert source.list_types() == frozenset({"Patient"})
        assert source.count("Patient", DAY) == 1
        assert resource_ids(source.fetch(["Patient"], DAY)) == ["p1"]


@pytest.mark.parametrize("cut", [slice(0, 30), slice(0, -4)])
def test_undeclared_gzip_that_broke_off_is_requested_again(cut: slice) -> None:
    body = gzip.compress(json.dumps(bundle([patient(1)])).encode())
    with ScriptedServer([Reply(body[cut]), Reply(body)]) as server:
        assert resource_ids(build_search_source(server).fetch(["Patient"], DAY)) == ["p1"]


def _outcome(*severities: object) -> dict[str, Any]:
    issues = [{"severity": severity, "code": "incomplete", "diagnostics": SECRET} for severity in severities]
    return {"resourceType": "OperationOutcome", "issue": issues}


@pytest.mark.parametrize(
    ("severities", "noticed"),
    [
        (["error"], "error"),
        (["fatal"], "error"),
        (["information", "error", "warning"], "error"),
        (["unheard of"], "error"),
        ([None], "error"),
        (["warning", "information"], "warning"),
        (["information"], None),
        ([], None),
    ],
)
@pytest.mark.parametrize("search", [{"search": {"mode": "outcome"}}, {"search": {"mode": "include"}}, {}])
def test_an_outcome_among_the_entries_is_heard(
    severities: list[object], noticed: str | None, search: dict[str, Any]
) -> None:
    page = bundle([patient(1)])
    page["entry"].append({"resource": _outcome(*severities), **search})
    with ScriptedServer([reply(page)]) as server:
        source = build_search_source(server)
        assert resource_ids(source.fetch(["Patient"], DAY)) == ["p1"]
        notices = source.drain_notices()
    assert [notice.severity for notice in notices] == ([noticed] if noticed else [])
    assert all("incomplete" in notice.message and SECRET not in notice.message for notice in notices)
    assert all(notice.resource_type == "Patient" for notice in notices)


def test_an_unreadable_outcome_is_an_error() -> None:
    page = bundle([])
    page["entry"].append(
        {"resource": {"resourceType": "OperationOutcome", "issue": SECRET}, "search": {"mode": "outcome"}}
    )
    with ScriptedServer([reply(page)]) as server:
        source = build_search_source(server)
        assert list(source.fetch(["Patient"], DAY)) == []
        assert [notice.severity for notice in source.drain_notices()] == ["error"]


def test_a_match_that_is_marked_as_included_is_a_match() -> None:
    page = bundle([patient(1)])
    page["entry"].append({"resource": patient(2), "search": {"mode": "include"}})
    with ScriptedServer([reply(page)]) as server:
        assert resource_ids(build_search_source(server).fetch(["Patient"], DAY)) == ["p1", "p2"]


def test_searches_and_counts_ask_for_answers_that_are_not_cached() -> None:
    with ScriptedServer(lambda request: reply(bundle([], total=0))) as server:
        source = build_search_source(server)
        list(source.fetch(["Patient"], DAY))
        source.count("Patient", DAY)
        source.find_extent(["Patient"])
        list(source.fetch_ids("Patient", ["p1"]))
        assert {request.headers["Cache-Control"] for request in server.requests} == {"no-cache"}


def test_the_age_of_a_cached_answer_is_a_warning_once() -> None:
    with ScriptedServer(lambda request: reply(bundle([], total=0), Age="90")) as server:
        source = build_search_source(server)
        for _ in range(2):
            list(source.fetch(["Patient"], DAY))
        (notice,) = source.drain_notices()
        assert notice.severity == "warning"
        assert "90 s old (its Age header): exclude the FHIR server from the cache" in notice.message


def test_an_answer_from_before_the_end_of_its_interval_is_an_error() -> None:
    dated = reply(bundle([patient(1)]), Date="Mon, 01 Jan 2024 12:00:00 GMT")
    with ScriptedServer([dated]) as server:
        source = build_search_source(server)
        assert resource_ids(source.fetch(["Patient"], DAY)) == ["p1"]
        notices = [notice for notice in source.drain_notices() if notice.severity == "error"]
    assert [notice.code for notice in notices if notice.code != "clock-skew"] == ["outdated-answer"]
    assert "12 hours before the end" in notices[-1].message


@pytest.mark.parametrize("link", ["?page=gone", "?page=1", None])
def test_a_next_link_that_leads_nowhere_is_the_end_if_all_that_the_server_counts_has_come(link: str | None) -> None:
    """The link leads to 404, in a circle, or has no address."""

    def script(request: ReceivedRequest) -> Reply:
        if request.all("page") == ["gone"]:
            return reply({}, 404)
        page = bundle([] if request.all("_summary") else [patient(1)], total=1)
        page["link"] = [{"relation": "next", "url": link}]
        return reply(page)

    with ScriptedServer(script) as server:
        source = build_search_source(server)
        assert resource_ids(source.fetch(["Patient"], DAY)) == ["p1"]
        (notice,) = source.drain_notices()
        assert (notice.code, notice.severity) == ("next-link", "warning")


@pytest.mark.parametrize("total", [None, 2])
def test_a_next_page_without_an_address_is_an_error_if_the_server_counts_more_or_nothing(total: int | None) -> None:
    page = bundle([patient(1)], total=total) | {"link": [{"relation": "next"}]}
    with ScriptedServer(lambda request: reply(page)) as server:
        source = build_search_source(server)
        assert resource_ids(source.fetch(["Patient"], DAY)) == ["p1"]
        assert "error" in {notice.severity for notice in source.drain_notices()}


def _build_proxied(server: ScriptedServer, link_base: str = "") -> SearchSource:
    retrier = Retrier(RetryPolicy(attempts=2), sleep=lambda seconds: None)
    client = FhirClient(f"{server.origin}/proxy/fhir", link_base=link_base, timeout=10, retrier=retrier)
    return SearchSource(client, now=lambda: datetime(2024, 6, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    "links",
    ["{origin}/fhir", "http://internal.example:8080/fhir", "https://internal.example/fhir/r4"],
    ids=["without its prefix", "another origin", "another scheme and path"],
)
def test_links_to_another_base_are_named_and_rewritten_by_the_setting(links: str) -> None:
    def script(request: ReceivedRequest) -> Reply:
        if not request.path.startswith("/proxy/fhir"):
            return Reply(b"<html>", 404)
        if request.all("page"):
            return reply(bundle([patient(2)], total=2))
        return reply(bundle([patient(1)], f"{base}/Patient?page=2&name={SECRET}", total=2))

    with ScriptedServer(script) as server:
        base = links.format(origin=server.origin)
        with pytest.raises(
            NotFhir, match=f"point to {base} instead of .*/proxy/fhir: set the link base to {base} "
        ) as caught:
            list(_build_proxied(server).fetch(["Patient"], DAY))
        assert SECRET not in str(caught.value)
        rewritten = _build_proxied(server, f"{base}/").fetch(["Patient"], DAY)
        assert resource_ids(rewritten) == ["p1", "p2"]


def test_a_working_link_outside_of_the_base_url_is_followed() -> None:
    def script(request: ReceivedRequest) -> Reply:
        return reply(bundle([patient(2)]) if request.path == "/pages" else bundle([patient(1)], "/pages?page=2"))

    with ScriptedServer(script) as server:
        assert resource_ids(_build_proxied(server).fetch(["Patient"], DAY)) == ["p1", "p2"]
