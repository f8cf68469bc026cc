"""The server of the metrics answers whatever other connections do."""

import socket
from contextlib import ExitStack, suppress
from threading import enumerate as list_threads

import pytest
import requests

from fhir_assets.metrics import server
from fhir_assets.metrics.exposition import serve_metrics


def test_silent_connections_have_a_bounded_number_of_threads_and_the_metrics_are_served() -> None:
    with serve_metrics("127.0.0.1", find_port()) as port, ExitStack() as opened:
        for _ in range(60):
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", port or 0)))
            connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).status_code == 200
        first = opened.enter_context(socket.create_connection(("127.0.0.1", port or 0)))
        first.close()
        threads = [thread for thread in list_threads() if "process_request" in thread.name]
        assert len(threads) <= 2 * server.MAX_CONNECTIONS


@pytest.mark.parametrize("sent", [b"GET /metrics HTTP/1.1\r\n", b"GET /metrics HTTP/1.1\r\nX: " + b"v" * 400_000])
def test_a_request_that_is_slow_or_large_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.3)
    with (
        serve_metrics("127.0.0.1", find_port()) as port,
        socket.create_connection(("127.0.0.1", port or 0), timeout=30) as connection,
    ):
        with suppress(ConnectionError):
            connection.sendall(sent)
            assert connection.recv(100) == b""


def find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
