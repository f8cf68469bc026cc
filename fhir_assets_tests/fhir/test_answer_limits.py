"""The limits of answers: time and size, before and after decompression, on every road to a server.

The servers are real and slow: each sends a byte after another without end, or as much as the client reads. A test
passes if the call ends with the error that names the limit.
"""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from requests import Request

from fhir_assets.api.dagster import DagsterClient
from fhir_assets.delivery.connector.server import FhirServer, TransientFailure
from fhir_assets.delivery.webhook import Webhook
from fhir_assets.errors import DagsterUnavailable, FhirAssetsError, NotFhir
from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.fhir.auth.smart import BackendServices
from fhir_assets.fhir.bulk.client import BulkClient
from fhir_assets.fhir.bulk.manifest import ExportFile, ExportRequest
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.limits import ClientLimits
from fhir_assets.fhir.transport.limits import AnswerLimits, AnswerTooSlow, Budget
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets_tests.support.dripping_server import Answer, create_certificate, endless, one_by_one, serve_bytes
from fhir_assets_tests.support.fhir_clients import Clock

Road = Callable[..., None]

ONCE = Retrier(RetryPolicy(attempts=1))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/fhir+json\r\n"
LIMITS = ClientLimits(timeout=5, answer_seconds=0.25, answer_bytes=1 << 20, file_bytes=1 << 20)
PATIENT = ClientLimits(timeout=60, answer_bytes=1 << 20, file_bytes=1 << 20)
"""The same limits of size, without a limit of time that a busy machine may reach first."""
TIME, SIZE = "the time limit of a", "the size limit of a"


def build_client(url: str, limits: ClientLimits) -> FhirClient:
    return FhirClient(url, timeout=5, retrier=ONCE, limits=limits)


def search(url: str, limits: ClientLimits = LIMITS) -> None:
    build_client(url, limits).get("Patient", lambda answer: None)


def kick_off(url: str, limits: ClientLimits = LIMITS) -> None:
    BulkClient(build_client(url, limits)).kick_off(ExportRequest("system", ("Patient",), None))


def poll(url: str, limits: ClientLimits = LIMITS) -> None:
    BulkClient(build_client(url, limits)).poll(f"{url}/status", 0)


def read_file(url: str, limits: ClientLimits = LIMITS) -> None:
    bulk = BulkClient(build_client(url, limits))
    with bulk.open_downloads() as downloads:
        for _ in bulk.read_lines(downloads, ExportFile("Patient", f"{url}/file", None), needs_token=False):
            pass


def upload(url: str, limits: ClientLimits = LIMITS) -> None:
    build_client(url, limits).post(url, bytes(1 << 24), lambda answer: None, expect={200})


def request_token(url: str, limits: ClientLimits = LIMITS) -> None:
    token_url = url.replace("/fhir", "/token")
    credentials = BackendServices(
        url, "client", secret="secret", token_url=token_url, retrier=ONCE, limits=limits.answer
    )
    Request("GET", url, auth=credentials).prepare()


def discover(url: str, limits: ClientLimits = LIMITS) -> None:
    credentials = BackendServices(url, "client", secret="secret", retrier=ONCE, limits=limits.answer)
    Request("GET", url, auth=credentials).prepare()


def deliver_change(url: str, limits: ClientLimits = LIMITS) -> None:
    FhirServer(url, Credentials(), timeout=5, connections=1, limits=limits.answer).call("GET", "Patient/1")


ROADS = [search, kick_off, poll, read_file, upload, request_token, discover, deliver_change]
ENDS = pytest.raises((FhirAssetsError, TransientFailure), match=f"{TIME}|{SIZE}")


@pytest.mark.parametrize("road", ROADS)
def test_a_server_that_sends_its_headers_byte_by_byte_is_given_up(road: Road) -> None:
    with serve_bytes(one_by_one(HEAD + b"X-Long: a"), pause=0.05) as url, ENDS:
        road(url)


@pytest.mark.parametrize("road", [search, read_file, deliver_change, request_token])
@pytest.mark.parametrize(
    "body",
    [
        b"\r\n{",
        b"Content-Encoding: gzip\r\n\r\n\x1f\x8b\x08\x08\0\0\0\0\0\x03name",
        b"Transfer-Encoding: chunked\r\n\r\n0",
    ],
    ids=["body", "file-name-of-gzip", "size-of-a-chunk"],
)
def test_a_server_that_sends_its_body_byte_by_byte_is_given_up(road: Road, body: bytes) -> None:
    answer = one_by_one(body)
    with serve_bytes(lambda: [HEAD, *answer_start(answer)], pause=0.05) as url, ENDS:
        road(url)


def answer_start(answer: Answer) -> list[bytes]:
    """Return the first bytes of an answer, more than the time limit allows."""
    return [piece for piece, _ in zip(answer(), range(400), strict=False)]


@pytest.mark.parametrize("road", ROADS)
def test_an_answer_without_end_is_given_up(road: Road) -> None:
    with serve_bytes(endless(HEAD + b"\r\n", b" " * 65536)) as url, ENDS:
        road(url)


@pytest.mark.parametrize("road", [search, read_file, deliver_change, request_token])
def test_preliminary_answers_without_end_are_given_up(road: Road) -> None:
    with serve_bytes(endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)) as url, ENDS:
        road(url)


BOMBS = {
    "gzip": gzip.compress(bytes(1 << 26)),
    "gzip-in-gzip": gzip.compress(gzip.compress(bytes(1 << 26))),
    "gzip, gzip": gzip.compress(gzip.compress(bytes(1 << 26))),
    "deflate": zlib.compress(bytes(1 << 26)),
    "undeclared": gzip.compress(bytes(1 << 26)),
}


@pytest.mark.parametrize("coding", BOMBS)
@pytest.mark.parametrize("road", [search, poll, read_file, request_token, deliver_change])
def test_an_answer_that_is_large_once_it_is_decompressed_is_given_up(road: Road, coding: str) -> None:
    declared = "" if coding == "undeclared" else f"Content-Encoding: {coding.replace('-in-gzip', '')}\r\n"
    answer = HEAD + f"{declared}Content-Length: {len(BOMBS[coding])}\r\n\r\n".encode() + BOMBS[coding]
    size = pytest.raises((FhirAssetsError, TransientFailure), match=f"larger than {1 << 20} bytes.*{SIZE}")
    with serve_bytes(lambda: [answer]) as url, size:
        road(url, PATIENT)


@pytest.mark.parametrize("road", [search, read_file])
def test_the_limits_hold_with_tls(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = create_certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with serve_bytes(one_by_one(HEAD + b"X-Long: a"), pause=0.05, certificate=certificate) as url, ENDS:
        road(url)
    with serve_bytes(endless(HEAD + b"\r\n", b" " * 65536), certificate=certificate) as url, ENDS:
        road(url)


def test_the_webhook_and_dagster_are_given_up_too() -> None:
    with serve_bytes(one_by_one(HEAD + b"X-Long: a"), pause=0.05) as url:
        assert not Webhook(url, ui_url="http://dagster", seconds=0.25, retrier=ONCE).deliver([], [])
        with pytest.raises(DagsterUnavailable):
            DagsterClient(url, timeout=0.03).status("run")


def test_only_the_time_of_waiting_for_the_server_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("fhir_assets.fhir.transport.limits.time.monotonic", lambda: clock.now)
    budget = Budget(AnswerLimits(10))
    for _ in range(3):
        assert budget.start_wait() > 0
        clock.sleep(3)
        budget.end_wait()
        clock.sleep(100)
    assert budget.start_wait() == 1
    clock.sleep(1)
    budget.end_wait()
    with pytest.raises(AnswerTooSlow, match="incomplete after 10 s"):
        budget.start_wait()


def test_a_file_that_almost_stands_still_is_given_up_before_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("fhir_assets.fhir.transport.limits.time.monotonic", lambda: clock.now)
    budget = Budget(AnswerLimits(1000, stall_seconds=10))
    for size in (1 << 16, 100, 100, 100):
        budget.start_wait()
        clock.sleep(4)
        budget.end_wait()
        budget.receive(size)
    with pytest.raises(AnswerTooSlow, match="less than 64 KiB came within 10 s"):
        budget.start_wait()


def test_json_that_needs_much_more_memory_than_its_size_is_refused() -> None:
    body = b'{"resourceType":"Bundle","entry":[' + b"[]," * 2_100_000 + b"[]]}"
    answer = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    limits = ClientLimits(timeout=5)
    with serve_bytes(lambda: [answer]) as url, pytest.raises(NotFhir, match="more than 2,000,000 elements"):
        build_client(url, limits).get("Patient", lambda answer: None)


def test_a_server_that_is_too_slow_is_asked_twice_only() -> None:
    many = Retrier(RetryPolicy(attempts=8), sleep=lambda seconds: None)
    asked: list[bool] = []

    def answer() -> list[bytes]:
        asked.append(True)
        return answer_start(one_by_one(HEAD + b"X-Long: a"))

    with serve_bytes(answer, pause=0.05) as url:
        client = FhirClient(url, timeout=5, retrier=many, limits=LIMITS)
        with client, pytest.raises(FhirAssetsError, match="tried 2 times"):
            client.get("Patient", lambda answer: None)
    assert len(asked) == 2
