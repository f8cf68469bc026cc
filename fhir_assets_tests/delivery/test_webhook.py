"""Alert webhooks are retried as a FHIR server is, and a refusal is final."""

import pytest

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.delivery.webhook import Webhook
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets_tests.support.scripted_server import Reply, ScriptedServer, reply


def deliver(url: str, waits: list[float] | None = None) -> bool:
    retrier = Retrier(
        RetryPolicy(attempts=3, first_wait=1), (waits if waits is not None else []).append, jitter=lambda: 1
    )
    return Webhook(url, ui_url="http://dagster", retrier=retrier).deliver([], [])


def test_a_throttled_message_is_sent_again_after_the_requested_wait() -> None:
    waits: list[float] = []
    with ScriptedServer([reply({}, 429, Retry_After="10"), Reply(status=500), Reply()]) as server:
        assert deliver(server.url, waits)
        assert len({request.body for request in server.requests}) == 1
    assert waits == [11, 2]


def test_an_unreachable_webhook_does_not_accept_the_message() -> None:
    with ScriptedServer([Reply(status=503)] * 9) as server:
        assert not deliver(server.url)
        assert len(server.requests) == 3
    assert not deliver(f"http://127.0.0.1:{find_free_port()}")


def test_a_refused_message_is_not_sent_again() -> None:
    with ScriptedServer([Reply(status=404), Reply()]) as server:
        assert not deliver(server.url)
        assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"", b"ok", b"1", b"{}", b'{"ok":true}', b'"accepted"', b"[" * 100_000])
def test_what_webhooks_answer_is_a_success(body: bytes) -> None:
    with ScriptedServer([Reply(body)]) as server:
        assert deliver(server.url)


@pytest.mark.parametrize(
    "body",
    [
        b" <!DOCTYPE html><title>Sign in</title>",
        b"Webhook message delivery failed with error: Microsoft Teams endpoint returned HTTP error 429",
        b'{"ok":false}',
        b'{"error":"invalid_token"}',
    ],
)
def test_a_status_of_success_with_a_body_that_contradicts_it_is_not_believed(body: bytes) -> None:
    with ScriptedServer([Reply(body)] * 3) as server:
        assert not deliver(server.url)
        assert len(server.requests) == 3
    with ScriptedServer([Reply(body), Reply()]) as server:
        assert deliver(server.url)


def test_a_redirect_is_not_followed() -> None:
    with ScriptedServer([reply({}, 302, Location="/login"), Reply()]) as server:
        assert not deliver(server.url)
        assert len(server.requests) == 1
