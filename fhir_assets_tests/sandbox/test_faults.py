"""The sandbox server's faults, as a client sees them."""

from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
import requests
from pydantic import ValidationError

from fhir_assets.sandbox.fault_injection import Credentials
from fhir_assets.sandbox.faults import Fault, FaultDraw, FaultKind, FaultPlan, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.sandbox_observations import hourly_observations


def get(server: SandboxServer, path: str = "Observation?_count=10") -> requests.Response:
    return requests.get(f"{server.url}/{path}", timeout=10)


def next_url(bundle: dict[str, Any]) -> str:
    return next(str(link["url"]) for link in bundle["link"] if link["relation"] == "next")


def ids(bundle: dict[str, Any]) -> list[str]:
    return [e["resource"]["id"] for e in bundle["entry"]]


def test_a_throttled_response_has_a_retry_after_header(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.THROTTLE, retry_after=3))
    response = get(server)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "3")
    server.set_faults(Fault(kind=FaultKind.THROTTLE, retry_after=3, retry_after_date=True, status=503))
    response = get(server)
    assert response.status_code == 503
    assert parsedate_to_datetime(response.headers["Retry-After"]).tzinfo is not None
    assert response.json()["resourceType"] == "OperationOutcome"


def test_a_dropped_connection_ends_in_the_middle_of_the_response(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.DROP))
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        get(server)


def test_a_reset_connection_gives_no_response(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.RESET))
    with pytest.raises(requests.exceptions.ConnectionError):
        get(server)
    server.set_faults()
    assert get(server).status_code == 200


def test_a_write_is_executed_before_a_drop_and_not_before_a_reset(empty: SandboxServer) -> None:
    for kind, done in ((FaultKind.DROP, 200), (FaultKind.RESET, 404)):
        empty.set_faults(Fault(kind=kind, on=frozenset({RequestKind.UPDATE})))
        body = {"resourceType": "Patient", "id": kind.value}
        with pytest.raises(requests.exceptions.RequestException):
            requests.put(f"{empty.url}/Patient/{kind.value}", json=body, timeout=10)
        assert get(empty, f"Patient/{kind.value}").status_code == done


def test_a_truncated_body_has_its_declared_length_and_is_not_json(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.TRUNCATE))
    response = get(server)
    assert response.status_code == 200
    assert int(response.headers["Content-Length"]) == len(response.content)
    with pytest.raises(requests.exceptions.JSONDecodeError):
        response.json()


def test_a_body_can_be_html(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.HTML))
    response = get(server)
    assert (response.status_code, response.headers["Content-Type"][:9]) == (200, "text/html")


@pytest.mark.parametrize("status", [410, 404])
def test_an_expired_page_stays_expired_after_the_faults_end(server: SandboxServer, status: int) -> None:
    server.set_faults(Fault(kind=FaultKind.EXPIRE, status=status))
    first = get(server)
    assert first.status_code == 200
    assert requests.get(next_url(first.json()), timeout=10).status_code == status
    server.set_faults()
    assert requests.get(next_url(first.json()), timeout=10).status_code == 410


def test_a_duplicate_is_the_last_resource_of_the_previous_page(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.DUPLICATE))
    first = get(server).json()
    second = requests.get(next_url(first), timeout=10).json()
    assert ids(second)[0] == ids(first)[-1]
    assert len(ids(second)) == 11


def test_a_lost_page_is_missing_although_the_total_counts_it(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.LOSE_PAGE, times=1, on=frozenset({RequestKind.PAGE})))
    bundle = get(server).json()
    received = ids(bundle)
    while any(link["relation"] == "next" for link in bundle["link"]):
        bundle = requests.get(next_url(bundle), timeout=10).json()
        assert bundle["total"] == 100
        received += ids(bundle)
    assert received == [f"o{n}" for n in range(100) if not 10 <= n < 20]


def test_a_wrong_total_differs_by_the_configured_amount(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.WRONG_TOTAL, by=-3))
    assert get(server, "Observation?_summary=count").json()["total"] == 97
    assert get(server).json()["total"] == 97


def test_a_slow_response_is_complete(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.SLOW, seconds=0.01))
    assert get(server).json()["total"] == 100
    assert server.stats()["struck"] == {"slow": 1}


def test_overlapping_requests_are_counted(server: SandboxServer) -> None:
    server.set_faults(Fault(kind=FaultKind.SLOW, seconds=0.5))
    with ThreadPoolExecutor(3) as threads:
        responses = list(threads.map(get, [server] * 3))
    assert [response.status_code for response in responses] == [200] * 3
    assert server.stats()["max_in_flight"] > 1


def test_a_fault_affects_every_nth_request_of_its_kind_after_an_offset_and_up_to_a_limit() -> None:
    plan = FaultPlan(
        faults=(Fault(kind=FaultKind.ERROR, on=frozenset({RequestKind.SEARCH}), every=3, after=1, times=2),)
    )
    draw = FaultDraw(plan)
    affected = []
    for n in range(1, 15):
        assert not draw.draw(RequestKind.READ)
        if draw.draw(RequestKind.SEARCH):
            affected.append(n)
    assert affected == [4, 7]


def test_faults_by_probability_are_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[bool]:
        draw = FaultDraw(FaultPlan(faults=(Fault(kind=FaultKind.ERROR, probability=0.3),), seed=seed))
        return [bool(draw.draw(RequestKind.SEARCH)) for _ in range(300)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert 50 < sum(drawn(1)) < 130


def test_a_fault_on_request_kinds_that_it_cannot_affect_is_refused(server: SandboxServer) -> None:
    with pytest.raises(ValidationError):
        Fault(kind=FaultKind.EXPIRE, on=frozenset({RequestKind.READ}))
    own = server.url.replace("/fhir", "/_sandbox/faults")
    response = requests.put(own, json={"faults": [{"kind": "earthquake"}]}, timeout=10)
    assert response.status_code == 422
    assert requests.get(own, timeout=10).json()["faults"] == []


def test_faults_can_be_set_at_the_start_and_removed_later() -> None:
    with SandboxServer(hourly_observations(2), faults=(Fault(kind=FaultKind.ERROR, status=503),)) as server:
        assert get(server).status_code == 503
        requests.delete(server.url.replace("/fhir", "/_sandbox/faults"), timeout=10)
        assert get(server).status_code == 200


def test_the_statistics_count_requests_by_kind_and_can_be_reset(server: SandboxServer) -> None:
    get(server, "metadata")
    get(server, "Observation?_summary=count")
    requests.get(next_url(get(server).json()), timeout=10)
    get(server, "Observation/o1")
    stats = server.stats()
    assert stats["requests"] == {"metadata": 1, "count": 1, "search": 1, "page": 1, "read": 1}
    assert stats["max_in_flight"] == 1
    assert stats["resources"] == {"Observation": 100}
    assert "GET /fhir/Observation?_summary=count" in stats["recent"]
    server.reset_stats()
    assert server.stats()["requests"] == {}


@pytest.mark.parametrize(
    ("credentials", "right", "scheme"),
    [
        (Credentials(username="u", password="p"), "Basic dTpw", "Basic"),
        (Credentials(token="t"), "Bearer t", "Bearer"),
    ],
)
def test_credentials_are_required_everywhere_except_for_the_metadata(
    credentials: Credentials, right: str, scheme: str
) -> None:
    with SandboxServer(hourly_observations(1), credentials=credentials) as server:
        for headers in ({}, {"Authorization": right + "x"}):
            response = requests.get(f"{server.url}/Observation", headers=headers, timeout=10)
            assert (response.status_code, response.json()["resourceType"]) == (401, "OperationOutcome")
            assert response.headers["WWW-Authenticate"].startswith(scheme)
        headers = {"Authorization": right}
        assert requests.get(f"{server.url}/Observation", headers=headers, timeout=10).status_code == 200
        assert get(server, "metadata").status_code == 200
