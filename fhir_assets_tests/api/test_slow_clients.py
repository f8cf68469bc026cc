"""Clients that send slowly, too much or nothing, and requests that take long: the others are answered."""

import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from threading import active_count
from urllib.parse import urlsplit

import psycopg
import pytest

from fhir_assets_tests.support.api import Api, Serve, role_secret

POST = f"POST /fhir HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {role_secret('admin')}\r\n"


@contextmanager
def connected(api: Api, sent: str = "", *, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    address = "127.0.0.1", urlsplit(api.url).port or 0
    with socket.create_connection(address, timeout=60, source_address=(source, 0)) as connection:
        with suppress(ConnectionError):
            connection.sendall(sent.encode())
        yield connection


def read_all(connection: socket.socket) -> str:
    """Return all that the server sends until it closes the connection."""
    received = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received.decode()


@pytest.mark.parametrize(
    "sent",
    [
        "GET /patients HTTP/1.1\r\n" + "".join(f"X-{n}: {'v' * 1000}\r\n" for n in range(400)),
        "GET /patients HTTP/1.1\r\nX: " + "v" * 400_000,
        "GET /patients HTTP/1.1\r\nX: " + "v" * 80_000 + "\r\n\r\n",
        "GET /" + "v" * 400_000,
    ],
    ids=["many headers", "a header without end", "a complete head", "a long path"],
)
def test_a_request_with_large_headers_is_refused_before_its_headers_end(serve_in_threads: Serve, sent: str) -> None:
    api = serve_in_threads()
    with connected(api, sent) as connection:
        assert read_all(connection).startswith("HTTP/1.1 431 ")


def test_headers_after_the_body_have_the_same_limit(serve_in_threads: Serve) -> None:
    api = serve_in_threads()
    chunked = "POST /fhir HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    with connected(api, chunked + "".join(f"X-{n}: {'v' * 1000}\r\n" for n in range(400))) as connection:
        assert read_all(connection).count("HTTP/1.1 401 ") == 1


def test_a_request_whose_headers_do_not_end_in_time_is_closed(serve_in_threads: Serve) -> None:
    api = serve_in_threads(api_header_seconds=0.2)
    with connected(api, "GET /health/live HTTP/1.1\r\n") as connection:
        assert read_all(connection).startswith("HTTP/1.1 408 ")
    with connected(api) as silent:
        assert read_all(silent) == ""
    with connected(api, "GET /health/live HTTP/1.1\r\n\r\n") as second:
        assert second.recv(65536).startswith(b"HTTP/1.1 200 ")
        second.sendall(b"GET /")
        assert read_all(second).startswith("HTTP/1.1 408 ")


def test_a_body_that_does_not_end_in_time_is_refused(serve_in_threads: Serve) -> None:
    api = serve_in_threads(api_body_seconds=1)
    for headers in ("Content-Length: 1000\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"):
        with connected(api, POST + headers) as connection:
            answer = read_all(connection)
        assert answer.startswith("HTTP/1.1 408 ")
        assert "API_BODY_SECONDS" in answer
    with connected(api, "POST /fhir HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{") as unknown:
        assert read_all(unknown).startswith("HTTP/1.1 401 ")


def test_silent_connections_make_room_for_others_and_first_those_of_the_client_with_the_most(
    serve_in_threads: Serve,
) -> None:
    api = serve_in_threads(api_max_connections=10)
    request = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(api, source="127.0.0.2") as honest, ExitStack() as open_connections:
        honest.sendall(request)
        assert honest.recv(65536).startswith(b"HTTP/1.1 200 ")
        silent = [open_connections.enter_context(connected(api, "GET / HTTP/1.1\r\n")) for _ in range(30)]
        assert api.get("/health/live").status_code == 200
        honest.sendall(request)
        assert honest.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert [read_all(connection) for connection in silent[:20]] == [""] * 20


def test_the_end_of_the_server_does_not_wait_for_incomplete_bodies(serve: Serve) -> None:
    api = serve()
    assert api.process
    with connected(api, POST + "Content-Length: 1000\r\n\r\n{"):
        api.process.terminate()
        try:
            api.process.wait(15)
        except subprocess.TimeoutExpired:
            pytest.fail("the server waits for a body")


def test_requests_with_a_key_that_take_long_leave_the_pool_to_the_others(
    serve_in_threads: Serve, database: str
) -> None:
    api = serve_in_threads()
    patient = {"records": [{"resourceType": "Patient", "id": "p", "gender": "female"}]}
    assert api.post("/api/v1/ingest", json=patient, headers={"Idempotency-Key": "first"}).status_code == 202

    def post(key: str) -> tuple[int, str | None]:
        answer = api.post("/api/v1/ingest", json=patient, headers={"Idempotency-Key": key})
        return answer.status_code, answer.json()["task_id"]

    with psycopg.connect(database, autocommit=True) as watcher, psycopg.connect(database) as blocker:
        with ThreadPoolExecutor(8) as executor:
            blocker.execute("LOCK TABLE ops.idempotency IN ACCESS EXCLUSIVE MODE")
            posts = [executor.submit(post, f"k{n % 7}") for n in range(8)]
            # Seven wait for the table, and the eighth for the first.
            while watcher.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() != (7,):
                assert not any(posted.done() for posted in posts)
            assert api.get("/patients").status_code == 200
            blocker.rollback()
            answers = [posted.result() for posted in posts]
    assert {status for status, _ in answers} == {202}
    assert answers[7] == answers[0]
    assert len(set(answers)) == 7


def test_checks_of_readiness_at_once_share_one_check(serve_in_threads: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as dagster:
        api = serve_in_threads(dagster_webserver_url=f"http://127.0.0.1:{dagster.getsockname()[1]}")
        with ThreadPoolExecutor(60) as executor:
            checks = [executor.submit(api.get, "/health", role=None) for _ in range(60)]
            connection, _ = dagster.accept()
            assert api.get("/patients").status_code == 200
            while active_count() < 60 or not all(check.running() for check in checks):
                pass
            dagster.setblocking(False)
            with pytest.raises(BlockingIOError):
                dagster.accept()
            dagster.close()
            connection.close()
            assert {check.result().status_code for check in checks} == {503}
