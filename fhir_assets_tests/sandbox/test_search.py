"""Searching the sandbox server."""

from typing import Any

import pytest
import requests

from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.sandbox_observations import hourly_observations, observation


def get(server: SandboxServer, path: str, **headers: str) -> requests.Response:
    return requests.get(f"{server.url}/{path}", headers=headers, timeout=10)


def search(server: SandboxServer, path: str) -> dict[str, Any]:
    response = get(server, path)
    assert response.status_code == 200, response.text
    bundle: dict[str, Any] = response.json()
    return bundle


def ids(bundle: dict[str, Any], mode: str = "match") -> list[str]:
    return [e["resource"]["id"] for e in bundle.get("entry", []) if e["search"]["mode"] == mode]


def next_link(bundle: dict[str, Any]) -> str | None:
    return next((link["url"] for link in bundle["link"] if link["relation"] == "next"), None)


def all_ids(server: SandboxServer, path: str) -> list[str]:
    bundle = search(server, path)
    received = ids(bundle)
    while url := next_link(bundle):
        bundle = requests.get(url, timeout=10).json()
        received += ids(bundle)
    return received


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("_lastUpdated=ge2024-01-02", 76),
        ("_lastUpdated=gt2024-01-02", 52),
        ("_lastUpdated=lt2024-01-02", 24),
        ("_lastUpdated=le2024-01-02", 48),
        ("_lastUpdated=eq2024-01-02", 24),
        ("_lastUpdated=2024-01-02", 24),
        ("_lastUpdated=2024-01", 100),
        ("_lastUpdated=2024", 100),
        ("_lastUpdated=gt2024", 0),
        ("_lastUpdated=sa2024-01-02", 52),
        ("_lastUpdated=eb2024-01-02", 24),
        ("_lastUpdated=ge2024-01-02T06:00:00Z&_lastUpdated=lt2024-01-02T08:00:00.000Z", 2),
        ("_lastUpdated=gt2024-01-02T06:00:00.000Z&_lastUpdated=le2024-01-02T08:00:00.000Z", 2),
        ("_lastUpdated=ge2024-01-02T01:00:00%2B01:00&_lastUpdated=lt2024-01-02T02:00:00%2B01:00", 1),
        ("_lastUpdated=2024-01-02T06:00Z", 1),
        ("_lastUpdated=ge2024-01-03&_lastUpdated=lt2024-01-02", 0),
    ],
)
def test_last_updated_is_compared_at_the_precision_given(server: SandboxServer, query: str, count: int) -> None:
    assert search(server, f"Observation?{query}&_summary=count")["total"] == count
    assert len(all_ids(server, f"Observation?{query}&_count=7")) == count


@pytest.mark.parametrize("value", ["yesterday", "2024-13-01", "2024-02-30", "ne2024", "ge", "2024-1-1"])
def test_a_malformed_date_is_refused(server: SandboxServer, value: str) -> None:
    response = get(server, f"Observation?_lastUpdated={value}")
    assert response.status_code == 400
    assert response.json()["resourceType"] == "OperationOutcome"


def test_pages_give_every_resource_once_and_in_order(server: SandboxServer) -> None:
    expected = [f"o{n}" for n in range(100)]
    assert all_ids(server, "Observation?_count=9&_sort=_lastUpdated") == expected
    assert all_ids(server, "Observation?_count=9&_sort=-_lastUpdated") == expected[::-1]


def test_paging_is_a_snapshot_that_later_writes_do_not_change(server: SandboxServer) -> None:
    bundle = search(server, "Observation?_count=60&_sort=-_lastUpdated")
    requests.post(f"{server.url}/Observation", data=observation(500, "2024-02-01T00:00:00Z"), timeout=10)
    url = next_link(bundle)
    assert url is not None
    rest = requests.get(url, timeout=10).json()
    assert ids(rest) == [f"o{n}" for n in range(39, -1, -1)]
    assert rest["total"] == 100


def test_a_next_link_can_be_fetched_again(server: SandboxServer) -> None:
    url = next_link(search(server, "Observation?_count=60"))
    assert url is not None
    assert requests.get(url, timeout=10).json()["entry"] == requests.get(url, timeout=10).json()["entry"]


def test_a_next_link_expires_after_its_lifetime() -> None:
    with SandboxServer(hourly_observations(3), page_lifetime=-1) as server:
        url = next_link(search(server, "Observation?_count=2"))
        assert url is not None
        assert requests.get(url, timeout=10).status_code == 410


def test_resources_are_returned_byte_for_byte_as_they_were_loaded() -> None:
    odd = b'{ "resourceType" : "Patient","meta":{"lastUpdated":"2024-01-01T00:00:00+02:00"}, "id":"x","a":1.50E+2}'
    with SandboxServer([odd]) as server:
        assert get(server, "Patient/x").content == odd
        assert odd in get(server, "Patient?_count=5").content


def test_plain_parameters_narrow_a_search() -> None:
    resources = [
        observation(1, "2024-01-01T00:00:00Z", "a", "8302-2"),
        observation(2, "2024-01-02T00:00:00Z", "b", "8302-2"),
        observation(3, "2024-01-03T00:00:00Z", "a", "718-7"),
    ]
    with SandboxServer(resources) as server:
        assert all_ids(server, "Observation?patient=a") == ["o1", "o3"]
        assert all_ids(server, "Observation?subject=Patient/a&code=718-7") == ["o3"]
        assert all_ids(server, "Observation?code=http://loinc.org|8302-2") == ["o1", "o2"]
        assert all_ids(server, "Observation?code=http://other|8302-2") == []
        assert all_ids(server, "Observation?patient=a,b&status=final&_id=o2,o3") == ["o2", "o3"]
        assert all_ids(server, "Observation?_id=o2,o3&_id=o3,o9") == ["o3"]


def test_an_identifier_is_found_by_system_by_value_and_by_both() -> None:
    patient = b'{"resourceType":"Patient","id":"p","identifier":[{"system":"urn:mrn","value":"7"},{"value":"8"}]}'
    with SandboxServer([patient]) as server:
        for value in ("urn:mrn|7", "7", "urn:mrn|", "8", "|8", "9,7"):
            assert all_ids(server, f"Patient?identifier={value}") == ["p"], value
        for value in ("urn:mrn|8", "|7", "urn:other|7"):
            assert all_ids(server, f"Patient?identifier={value}") == [], value


def test_unknown_parameters_are_ignored_with_an_outcome(server: SandboxServer) -> None:
    bundle = search(server, "Observation?_count=2&colour=blue")
    assert len(ids(bundle)) == 2
    outcomes = [e["resource"] for e in bundle["entry"] if e["search"]["mode"] == "outcome"]
    assert "colour" in outcomes[0]["issue"][0]["diagnostics"]
    assert bundle["total"] == 100


def test_unknown_parameters_are_refused_under_strict_handling(server: SandboxServer) -> None:
    assert get(server, "Observation?colour=blue", Prefer="handling=strict").status_code == 400
    assert get(server, "Observation?_count=2", Prefer="handling=strict").status_code == 200


def test_included_patients_are_returned_with_the_matches() -> None:
    patient = b'{"resourceType":"Patient","id":"a"}'
    with SandboxServer([patient, *hourly_observations(3)]) as server:
        bundle = search(server, "Observation?_include=Observation:subject&_count=2")
        assert ids(bundle) == ["o0", "o1"]
        assert ids(bundle, "include") == ["a"]
        assert bundle["total"] == 3


def test_the_total_is_left_out_on_request(server: SandboxServer) -> None:
    assert "total" not in search(server, "Observation?_total=none")
    assert search(server, "Observation?_total=accurate")["total"] == 100


def test_a_summary_of_count_has_no_entries(server: SandboxServer) -> None:
    for query in ("_summary=count", "_count=0"):
        bundle = search(server, f"Observation?{query}")
        assert "entry" not in bundle
        assert bundle["total"] == 100


def test_a_search_by_post_equals_the_search_by_get(server: SandboxServer) -> None:
    form = {"_lastUpdated": "ge2024-01-05", "_count": "2"}
    response = requests.post(f"{server.url}/Observation/_search", data=form, timeout=10).json()
    assert ids(response) == ["o96", "o97"]


def test_the_capability_statement_lists_the_types(server: SandboxServer) -> None:
    def types(url: str) -> list[str]:
        return [r["type"] for r in requests.get(f"{url}/metadata", timeout=10).json()["rest"][0]["resource"]]

    assert len(types(server.url)) == 30
    with SandboxServer(hourly_observations(1), all_types=False) as small:
        assert types(small.url) == ["Observation"]
        assert get(small, "Patient").status_code == 404
    assert get(server, "Patient?_summary=count").json()["total"] == 0


def test_an_unknown_resource_is_an_operation_outcome(server: SandboxServer) -> None:
    for path in ("Nothing", "Patient/1", "Observation/o1/_history/9", "a/b/c/d", "?_page=made-up"):
        response = get(server, path)
        assert response.status_code in (404, 410), path
        assert response.json()["resourceType"] == "OperationOutcome"
