"""Requests to a FHIR server: retries, refusals, and the messages of errors."""

import gzip
import json
import socket
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.errors import ConfigurationError, NotFhir, ServerRefused, ServerUnavailable
from fhir_assets.fhir.auth.credentials import Bearer, Credentials, build_credentials
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.response import FhirResponse, HttpStatusError, invalid_json_failure
from fhir_assets.retries import Retrier, RetryPolicy, read_retry_after
from fhir_assets_tests.support.fhir_clients import Clock, build_client
from fhir_assets_tests.support.scripted_server import Reply, ScriptedServer, reply

SECRET = "Mustermann"


def body_of(answer: FhirResponse) -> bytes:
    return answer.body


def complete_json(answer: FhirResponse) -> object:
    try:
        return json.loads(answer.body)
    except ValueError:
        raise invalid_json_failure(answer) from None


def test_waits_grow_up_to_the_maximum() -> None:
    clock = Clock()
    with ScriptedServer([Reply(status=503)] * 4 + [Reply(b"there")]) as server:
        assert build_client(server.url, clock, first_wait=1, max_wait=4).get("Patient", body_of) == b"there"
    assert clock.waits == [1, 2, 4, 4]


@pytest.mark.parametrize("jitter", [0, 0.5, 1])
def test_jitter_takes_at_most_half_of_a_wait(jitter: float) -> None:
    assert 4 <= RetryPolicy(first_wait=2, max_wait=60).wait_seconds(3, None, jitter) <= 8


def test_the_client_waits_for_a_retry_after_in_seconds() -> None:
    clock = Clock()
    with ScriptedServer([reply({}, 429, Retry_After="7"), Reply(b"there")]) as server:
        build_client(server.url, clock).get("Patient", body_of)
    assert 7 <= clock.waits[0] < 8


def test_the_client_waits_for_a_retry_after_as_a_date() -> None:
    clock = Clock()
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=200), usegmt=True)
    with ScriptedServer([reply({}, 503, Retry_After=date), Reply(b"there")]) as server:
        build_client(server.url, clock).get("Patient", body_of)
    assert 150 < clock.waits[0] <= 220


@pytest.mark.parametrize(
    "date",
    [
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
        "Sun, 06 Nov 1994 09:49:37 +0100",
    ],
)
def test_retry_after_is_read_in_every_form_of_an_http_date(date: str) -> None:
    assert read_retry_after(date, datetime(1994, 11, 6, 8, 49, 7, tzinfo=UTC)) == 30
    assert read_retry_after(date, datetime(1995, 1, 1, tzinfo=UTC)) == 0


@pytest.mark.parametrize("seconds", ["864000", "9" * 400])
def test_a_long_retry_after_is_limited(seconds: str) -> None:
    clock = Clock()
    with ScriptedServer([reply({}, 429, Retry_After=seconds), Reply(b"there")]) as server:
        build_client(server.url, clock, max_retry_after=100).get("Patient", body_of)
    assert clock.waits == [pytest.approx(110)]


@pytest.mark.parametrize("value", ["soon", "", "Fri, 99 Nov 2026", "1.5.2"])
def test_an_invalid_retry_after_is_ignored(value: str) -> None:
    clock = Clock()
    with ScriptedServer([reply({}, 429, Retry_After=value), Reply(b"there")]) as server:
        build_client(server.url, clock, first_wait=3).get("Patient", body_of)
    assert clock.waits == [3]


def test_the_final_error_contains_the_number_of_attempts_and_the_duration() -> None:
    with ScriptedServer([Reply(status=502)] * 9) as server:
        with pytest.raises(ServerUnavailable, match=r"Patient: the server answered 502 \(tried 3 times over 6 s\)"):
            build_client(server.url, attempts=3, first_wait=2).get("Patient", body_of)
        assert len(server.requests) == 3


def test_no_wait_exceeds_the_budget() -> None:
    clock = Clock()
    with ScriptedServer([Reply(status=503)] * 99) as server:
        with pytest.raises(ServerUnavailable):
            build_client(server.url, clock, attempts=99, first_wait=10, max_wait=10, budget=35).get("Patient", body_of)
    assert clock.now == 30


@pytest.mark.parametrize(
    "fault",
    [
        Reply(b'{"resourceType": "Bundle"}', cut=9),
        Reply(b'{"resourceType": "Bu'),
        Reply(reset=True),
        Reply(b"<!DOCTYPE html><html>try later</html>", headers={"Content-Type": "text/html"}),
        Reply(b""),
        Reply(gzip.compress(b'{"resourceType": "Bundle"}')[:-14], headers={"Content-Encoding": "gzip"}),
        Reply(b"no gzip at all", headers={"Content-Encoding": "gzip"}),
        Reply(status=500),
        Reply(status=408),
    ],
)
def test_a_request_is_retried_after_a_transient_fault(fault: Reply) -> None:
    bundle = {"resourceType": "Bundle"}
    with ScriptedServer([fault, reply(bundle)]) as server:
        assert build_client(server.url).get("Patient", complete_json) == bundle
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 412, 422, 501])
def test_a_refused_request_is_not_retried_and_the_error_has_its_status(status: int) -> None:
    with ScriptedServer([reply({"text": SECRET}, status)]) as server:
        with pytest.raises(HttpStatusError) as exc_info:
            build_client(server.url).get("Patient", body_of)
        assert exc_info.value.status == status
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_errors_contain_no_body_no_query_and_no_id(status: int) -> None:
    with ScriptedServer([reply({"text": SECRET}, status)] * 2) as server:
        client = build_client(server.url, attempts=1)
        for path, params in (
            ("Patient", [("name", SECRET)]),
            (f"Patient/{SECRET}", []),
            (f"{server.url}?x={SECRET}", []),
        ):
            with pytest.raises((ServerRefused, ServerUnavailable)) as exc_info:
                client.get(path, body_of, params=params)
            assert SECRET not in str(exc_info.value)
            assert server.url in str(exc_info.value)


@pytest.mark.parametrize(
    ("auth", "setting"),
    [
        (build_credentials(), "set the token"),
        (build_credentials("anna", SECRET), "check the user name and the password"),
        (build_credentials(token=SECRET), "check the token"),
    ],
)
def test_the_error_for_status_401_names_the_setting_to_check(auth: Credentials, setting: str) -> None:
    with ScriptedServer([Reply(status=401)]) as server:
        with pytest.raises(ServerRefused, match=setting) as exc_info:
            build_client(server.url, auth=auth).get("Patient", body_of)
        assert SECRET not in str(exc_info.value)


def test_credentials_that_can_be_renewed_are_renewed_once() -> None:
    class Renewable(Bearer):
        def renew(self) -> bool:
            self._header = "Bearer second"
            return True

    with ScriptedServer([Reply(status=401), Reply(b"there"), *[Reply(status=401)] * 9]) as server:
        client = build_client(server.url, auth=Renewable("first"))
        assert client.get("Patient", body_of) == b"there"
        assert [request.headers["Authorization"] for request in server.requests] == ["Bearer first", "Bearer second"]
        with pytest.raises(ServerRefused):
            client.get("Patient", body_of)
        assert len(server.requests) == 4


def test_credentials_come_from_the_settings_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login anna password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with ScriptedServer([Reply(b"there")]) as server:
        build_client(server.url).get("Patient", body_of)
        assert "Authorization" not in server.requests[0].headers


def test_a_redirect_within_the_origin_is_followed_with_credentials() -> None:
    with ScriptedServer([reply({}, 302, Location="/fhir/r4/Patient?_count=1"), Reply(b"there")]) as server:
        client = build_client(server.url, auth=Bearer("t"))
        assert client.get("Patient", body_of, params=[("_count", "1")]) == b"there"
        assert server.requests[1].path == "/fhir/r4/Patient"
        assert server.requests[1].query == [("_count", "1")]
        assert server.requests[1].headers["Authorization"] == "Bearer t"


@pytest.mark.parametrize("link", ["file:///etc/patients.ndjson", "ftp://server.example/Patient", "http://[bad/x"])
def test_a_link_that_is_no_url_of_http_is_not_suggested_as_a_base(link: str) -> None:
    client = build_client("http://server.example/fhir")
    with pytest.raises(NotFhir, match=r"not a URL of http or https: the server.s paging is broken$"):
        client.resolve(link, client.base_url)


def test_no_request_is_sent_to_another_origin() -> None:
    with ScriptedServer([Reply(b"stolen")] * 3) as other:
        with ScriptedServer([reply({}, 302, Location=f"{other.url}/Patient?session={SECRET}")]) as server:
            client = build_client(server.url, auth=Bearer("t"))
            with pytest.raises(NotFhir, match="set the base URL") as exc_info:
                client.get("Patient", body_of)
            with pytest.raises(NotFhir, match="set the link base"):
                client.resolve(f"{other.url}?_page=2", server.url)
            with pytest.raises(ValueError, match="origin"):
                client.get(f"{other.url}/Patient", body_of)
        assert SECRET not in str(exc_info.value)
        assert other.requests == []


@pytest.mark.parametrize(
    "link",
    [
        "https://fhir.example/r4?_page=2",
        "http://fhir.example:8080/r4?_page=2",
        "//evil.example/",
        "http://fhir.example.org/r4",
    ],
)
def test_an_origin_consists_of_scheme_host_and_port(link: str) -> None:
    client = build_client("http://fhir.example/r4")
    with pytest.raises(NotFhir):
        client.resolve(link, "http://fhir.example/r4/Patient")
    assert client.resolve("http://FHIR.example:80/r4?_page=2", "http://fhir.example/r4/Patient")


def test_a_redirect_loop_is_an_error() -> None:
    with ScriptedServer(lambda request: reply({}, 302, Location=request.path)) as server:
        with pytest.raises(NotFhir, match="redirect loop"):
            build_client(server.url).get("Patient", body_of)


def test_one_connection_serves_many_requests() -> None:
    with ScriptedServer([Reply(b"there")] * 5) as server:
        client = build_client(server.url)
        for _ in range(5):
            client.get("Patient", body_of)
        assert len({request.connection for request in server.requests}) == 1


def test_compressed_responses_are_requested_and_decompressed() -> None:
    packed = Reply(gzip.compress(b"there"), headers={"Content-Encoding": "gzip"})
    with ScriptedServer([packed]) as server:
        assert build_client(server.url).get("Patient", body_of) == b"there"
        assert "gzip" in server.requests[0].headers["Accept-Encoding"]


def test_a_request_with_a_body_is_sent_again_after_a_transient_failure() -> None:
    with ScriptedServer([Reply(status=503), reply({"id": "a"}, 201), reply({}, 412)]) as server:
        client = build_client(server.url)
        answer = client.send("PUT", "Patient/a", b'{"resourceType":"Patient"}', headers={"If-Match": 'W/"1"'})
        assert (answer.status, answer.body) == (201, b'{"id": "a"}')
        assert {request.body for request in server.requests} == {b'{"resourceType":"Patient"}'}
        assert server.requests[1].headers["Content-Type"] == "application/fhir+json"
        assert client.send("PUT", "Patient/a", b"{}", expect={412}).status == 412


def test_a_refused_connection_is_an_error_that_names_the_setting() -> None:
    url = f"http://127.0.0.1:{find_free_port()}/fhir"
    with pytest.raises(ServerUnavailable, match=f"cannot reach {url} : connection refused") as exc_info:
        build_client(url).capabilities()
    assert "is the base URL right and the server up?" in str(exc_info.value)


def test_a_server_that_never_answered_is_tried_only_a_few_times() -> None:
    clock = Clock()
    url = f"http://127.0.0.1:{find_free_port()}/fhir"
    with pytest.raises(ServerUnavailable, match="tried 4 times"):
        build_client(url, clock, attempts=20).get("Patient", body_of)
    assert sum(clock.waits) < 10


def test_a_persistent_client_outlasts_an_outage_at_first_contact_once() -> None:
    clock = Clock()
    url = f"http://127.0.0.1:{find_free_port()}/fhir"
    retrier = Retrier(RetryPolicy(attempts=9), clock.sleep, lambda: clock.now, lambda: 1)
    client = FhirClient(url, retrier=retrier, persistent=True)
    with pytest.raises(ServerUnavailable, match="tried 9 times"):
        client.capabilities()
    assert sum(clock.waits) > 30
    with pytest.raises(ServerUnavailable, match=r"tried 4 times.*tried only a few times"):
        client.get("Patient", body_of)


def test_a_server_that_answered_before_is_retried_under_the_full_policy() -> None:
    clock = Clock()
    with ScriptedServer([Reply(b"there"), *[Reply(reset=True)] * 8, Reply(b"again")]) as server:
        client = build_client(server.url, clock, attempts=9)
        assert [client.get("Patient", body_of) for _ in range(2)] == [b"there", b"again"]
    assert len(clock.waits) == 8


def test_the_error_for_an_unknown_host_says_that_its_name_cannot_be_resolved() -> None:
    with pytest.raises(ServerUnavailable, match="its name cannot be resolved"):
        build_client("http://fhir.invalid/r4").capabilities()


def test_a_server_that_does_not_answer_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = FhirClient(
            f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.05, retrier=Retrier(RetryPolicy(attempts=1))
        )
        with pytest.raises(ServerUnavailable, match="no answer in time"):
            client.get("Patient", body_of)


@pytest.mark.parametrize(
    ("header", "drop"), [(b"Transfer-Encoding: chunked", b"1\r\n \r\n"), (b"Content-Length: 1000000", b" ")]
)
def test_a_response_that_arrives_byte_by_byte_ends_at_a_deadline(header: bytes, drop: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n\r\n")
                try:
                    while not ended.wait(0.02):
                        connection.sendall(drop)
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        client = FhirClient(
            f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3, retrier=Retrier(RetryPolicy(attempts=1))
        )
        with pytest.raises(ServerUnavailable, match="incomplete after"):
            client.get("Patient", body_of)
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "fhir.example/r4",
        "ftp://fhir.example",
        "http://",
        "file:///etc",
        "http://[::1",
        "http://fhir.example/r4?key=1",
        "http://fhir.example/r4#top",
    ],
)
def test_a_base_url_must_be_an_http_url(url: str) -> None:
    with pytest.raises(ConfigurationError, match="the base URL"):
        FhirClient(url)


@pytest.mark.parametrize("host", ["x" * 64 + ".example", "fhir.example:99999", ".example"])
def test_an_invalid_host_is_a_configuration_error(host: str) -> None:
    with pytest.raises(ConfigurationError, match="the base URL"):
        build_client(f"http://{host}/r4").get("Patient", body_of)


def test_credentials_in_the_base_url_are_refused_and_not_shown() -> None:
    with pytest.raises(ConfigurationError, match="the password") as exc_info:
        FhirClient(f"https://anna:{SECRET}@fhir.example/r4")
    assert SECRET not in str(exc_info.value)
