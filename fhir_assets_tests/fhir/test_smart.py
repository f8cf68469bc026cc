"""Access tokens of SMART Backend Services, against a scripted token endpoint."""

import pytest
import requests

from fhir_assets.errors import NotFhir, ServerRefused, ServerUnavailable
from fhir_assets.fhir.auth.smart import TOKEN_POLICY, BackendServices
from fhir_assets.retries import Retrier
from fhir_assets_tests.support.scripted_server import Reply, ScriptedServer, reply


class Waits:
    """A replacement of ``time.sleep`` that records the durations."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def backend_services(server: ScriptedServer, waits: Waits) -> BackendServices:
    retrier = Retrier(TOKEN_POLICY, waits, jitter=lambda: 1)
    return BackendServices(server.url, "client", secret="secret", token_url=f"{server.origin}/token", retrier=retrier)


def authorization(credentials: BackendServices) -> str:
    return requests.Request("GET", "http://fhir.example/", auth=credentials).prepare().headers["Authorization"]


def test_a_request_to_an_unavailable_token_endpoint_is_retried_after_its_retry_after() -> None:
    waits = Waits()
    script = [Reply(status=503), reply({}, 429, Retry_After="10"), reply({"access_token": "t", "expires_in": 300})]
    with ScriptedServer(script) as server:
        assert authorization(backend_services(server, waits)) == "Bearer t"
    assert waits.seconds == [1, 11]


def test_the_error_for_an_unavailable_token_endpoint_names_the_settings() -> None:
    with ScriptedServer([Reply(status=500)] * 9) as server:
        with pytest.raises(ServerUnavailable, match=r"token endpoint .* answered 500 \(tried 4 times.*the token URL"):
            authorization(backend_services(server, Waits()))
        assert len(server.requests) == 4


def test_the_request_of_a_refused_client_is_not_retried() -> None:
    with ScriptedServer([Reply(status=401)] * 2) as server:
        with pytest.raises(ServerRefused, match="check the client id"):
            authorization(backend_services(server, Waits()))
        assert len(server.requests) == 1


def test_a_response_without_a_token_is_an_error() -> None:
    with ScriptedServer([reply({"expires_in": 300})]) as server, pytest.raises(NotFhir, match="returns no token"):
        authorization(backend_services(server, Waits()))
