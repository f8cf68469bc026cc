"""Deletions in a server's history, in the forms that real servers give them."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.deletions import DeletionTimes, Target, parse_target, read_deleted_entries
from fhir_assets.fhir.record import Deletion
from fhir_assets.fhir.search.history import DeletionHistory
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply

SINCE = datetime(2026, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def at(minute: int) -> str:
    return f"2026-01-01T12:{minute:02}:00Z"


def moment(minute: int) -> datetime:
    return datetime(2026, 1, 1, 12, minute, tzinfo=UTC)


def live(id_: str, minute: int, version: str = "1") -> dict[str, Any]:
    meta = {"versionId": version, "lastUpdated": at(minute)}
    return {
        "fullUrl": f"https://h.example/fhir/Patient/{id_}",
        "resource": {"resourceType": "Patient", "id": id_, "meta": meta},
        "request": {"method": "PUT", "url": f"Patient/{id_}/_history/{version}"},
        "response": {"status": "200 OK", "etag": f'W/"{version}"'},
    }


def gone(id_: str, version: str = "2", **response: object) -> dict[str, Any]:
    """Return a deletion without a time, as HAPI writes it."""
    return {
        "fullUrl": f"https://h.example/fhir/Patient/{id_}",
        "request": {"method": "DELETE", "url": f"Patient/{id_}/_history/{version}"},
        "response": {"status": "200 OK", "etag": f'W/"{version}"', **response},
    }


def page(*entries: object, **more: object) -> dict[str, Any]:
    return {"resourceType": "Bundle", "type": "history", "entry": list(entries), **more}


def fetch(script: Callable[[ReceivedRequest], Reply] | list[Reply], notices: list[str] | None = None) -> list[Deletion]:
    with ScriptedServer(script) as server, FhirClient(server.url, timeout=10) as client:
        history = DeletionHistory(client)
        deletions = list(history.fetch_since("Patient", SINCE))
        if notices is not None:
            notices += [f"{notice.severity} {notice.message}" for notice in history.drain_notices()]
    return deletions


def fetch_entries(*entries: object) -> list[Deletion]:
    return fetch([reply(page(*entries), Date=format_datetime(NOW, usegmt=True))])


def test_a_deletion_without_a_time_gets_the_time_of_its_newer_neighbour() -> None:
    found = fetch_entries(live("b", 9), gone("a"), live("c", 5), live("a", 3))
    assert found == [Deletion("Patient", "a", moment(9), "2")]


def test_the_newest_deletion_gets_the_time_of_the_request_and_never_one_before_its_older_neighbour() -> None:
    (found,) = fetch_entries(gone("a"), live("c", 5), live("a", 3))
    assert NOW - timedelta(seconds=10) < found.at <= NOW
    just_now = NOW + timedelta(milliseconds=300)  # the Date header has no fraction
    version = live("a", 0)
    version["resource"]["meta"]["lastUpdated"] = just_now.isoformat()
    assert [d.at for d in fetch_entries(gone("a"), version)] == [just_now]


def test_a_deletion_that_a_newer_version_follows_is_none() -> None:
    assert fetch_entries(live("a", 9, "3"), gone("a"), live("a", 3)) == []
    assert fetch_entries(gone("a"), live("a", 9, "3"), live("a", 3)) == []
    dated = gone("a", lastModified=at(5))
    assert fetch_entries(live("a", 9, "3"), dated, live("a", 3)) == []


def test_deletions_in_a_row_share_their_neighbours_over_pages() -> None:
    def script(request: ReceivedRequest) -> Reply:
        if request.all("page"):
            return reply(page(gone("b"), live("d", 4)))
        link = [{"relation": "next", "url": f"{request.path}?page=2"}]
        return reply(page(live("x", 8), gone("a", "4"), link=link))

    assert fetch(script) == [Deletion("Patient", "a", moment(8), "4"), Deletion("Patient", "b", moment(8), "2")]


def test_a_history_of_nothing_but_a_deletion_without_any_time_is_applied_as_of_the_request() -> None:
    (found,) = fetch_entries(gone("a"))
    assert NOW - timedelta(seconds=10) < found.at <= NOW
    times = DeletionTimes(latest=None, fallback=SINCE)
    assert not list(times.add_deletion(Target("Patient", "a"), None))
    assert list(times.finish()) == [Deletion("Patient", "a", SINCE)]


AZURE = {
    "fullUrl": "https://h.example/Patient/a/_history/2",
    "resource": {"resourceType": "Patient", "id": "a", "meta": {"versionId": "2", "lastUpdated": at(7)}},
    "request": {"method": "DELETE", "url": "Patient/a"},
    "response": {"status": "204", "etag": 'W/"2"', "lastModified": at(7)},
}


@pytest.mark.parametrize(
    "entry",
    [
        AZURE,
        AZURE | {"response": {"status": "204", "etag": 'W/"2"'}},
        AZURE | {"request": {"method": "DELETE", "url": "https://h.example/Patient/a/_history/2"}, "response": {}},
        gone("a", lastModified=at(7)),
        {
            "fullUrl": "Patient/a",
            "request": {"method": "DELETE", "url": "Patient/a"},
            "response": {"status": "200 OK", "location": "Patient/a/_history/2", "lastModified": at(7)},
        },
        {
            "request": {"method": "GET", "url": "Patient/a/_history/2"},
            "response": {"status": "410", "lastModified": at(7)},
        },
        {
            "fullUrl": "https://h.example/Patient/a",
            "request": {"method": "DELETE", "url": "Patient?identifier=x"},
            "response": {"status": 204, "etag": "2", "lastModified": at(7)},
        },
    ],
)
def test_deletions_of_other_servers_are_read(entry: dict[str, Any]) -> None:
    assert fetch_entries(live("x", 9), entry, live("y", 1)) == [Deletion("Patient", "a", moment(7), "2")]


def test_a_deletion_that_names_no_resource_is_an_error_notice_and_does_not_hide_the_others() -> None:
    nameless = {"request": {"method": "DELETE", "url": "Patient?name=Mustermann"}, "response": {"status": "204"}}
    notices: list[str] = []
    found = fetch([reply(page(nameless, nameless, gone("a", lastModified=at(7))))], notices)
    assert [deletion.id for deletion in found] == ["a"]
    (notice,) = notices
    assert notice.startswith("error the history of Patient has deletions that do not name a Patient")
    assert "Mustermann" not in notice


@pytest.mark.parametrize("entry", [None, []])
def test_an_empty_history_has_no_deletions(entry: object) -> None:
    assert fetch([reply({"resourceType": "Bundle", "entry": entry, "link": None})]) == []


@pytest.mark.parametrize(
    "answer", [{"resourceType": "OperationOutcome"}, {}, page() | {"type": "searchset"}, page() | {"entry": [1]}]
)
def test_an_answer_that_is_no_history_is_an_error(answer: dict[str, Any]) -> None:
    with pytest.raises(NotFhir):
        fetch([reply(answer)])


def test_a_history_that_is_nested_too_deeply_is_an_error() -> None:
    depth = 100_000
    with pytest.raises(NotFhir):
        fetch([reply(b'{"resourceType":"Bundle","type":"history","x":' + b"[" * depth + b"]" * depth + b"}")])


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("Patient/a", Target("Patient", "a")),
        ("/Patient/a/", Target("Patient", "a")),
        ("https://h.example/r4/Patient/a/_history/2", Target("Patient", "a", "2")),
        ("https://h.example/FHIR/Patient", None),
        ("https://h.example/FHIR/Patient?identifier=Group/1", None),
        ("Patient", None),
        ("Patient?identifier=http://x/Patient/1", None),
        ("Nonsense/a", None),
        ("urn:uuid:0d3f2b2e-4b7a-4a57-8f7e-0b6b7a2f5c11", None),
    ],
)
def test_a_url_names_one_resource_or_none(url: str, target: Target | None) -> None:
    assert parse_target(url) == target


def test_lines_of_deleted_files_are_read_with_versioned_and_absolute_urls() -> None:
    line = (
        b'{"resourceType":"Bundle","type":"transaction","entry":['
        b'{"request":{"method":"DELETE","url":"https://h.example/fhir/Patient/a/_history/2"}},null,'
        b'{"fullUrl":"https://h.example/fhir/Patient/b","request":{"method":"DELETE","url":"Patient?identifier=x"}},'
        b'{"request":{"method":"DELETE","url":"Patient?identifier=x"}},'
        b'{"request":{"method":"PUT","url":"Patient/c"}}]}'
    )
    expected = [Deletion("Patient", "a", NOW, "2"), Deletion("Patient", "b", NOW), None]
    assert list(read_deleted_entries(line, NOW)) == expected
    for unreadable in (b"[]", b"no json", b'{"resourceType":"Patient"}', b'{"resourceType":"Bundle","entry":[1]}'):
        assert list(read_deleted_entries(unreadable, NOW)) == [None]
