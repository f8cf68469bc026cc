"""Access tokens of SMART Backend Services, against a scripted token endpoint."""

import pytest
import requests

from fhir_assets.errors import ConfigurationError, NotFhir, ServerRefused, ServerUnavailable
from fhir_assets.fhir.auth import smart
from fhir_assets.fhir.auth.smart import TOKEN_POLICY, BackendServices
from fhir_assets.retries import Retrier
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply


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


def discover(server: ScriptedServer, token_url: str | None = None) -> BackendServices:
    retrier = Retrier(TOKEN_POLICY, Waits(), jitter=lambda: 1)
    return BackendServices(server.url, "client", secret="secret", token_url=token_url, retrier=retrier)


def smart_server(token_url: str, token: Reply | None = None) -> ScriptedServer:
    """Return a server whose configuration names ``token_url``, and that answers anything else with ``token``."""

    def answer(request: ReceivedRequest) -> Reply:
        if request.path.endswith("/smart-configuration"):
            return reply({"token_endpoint": token_url.format(origin=server.origin)})
        return token or reply({"access_token": "t"})

    server = ScriptedServer(answer)
    return server


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_what_proves_the_identity_of_a_client_is_not_sent_along_a_redirect(status: int) -> None:
    with ScriptedServer(lambda request: reply({"access_token": "t"})) as other:
        redirect = Reply(status=status, headers={"Location": f"{other.origin}/token"})
        with (
            smart_server("{origin}/token", redirect) as server,
            pytest.raises(NotFhir, match="no token endpoint there"),
        ):
            authorization(discover(server))
        assert other.requests == []


def test_a_redirect_of_the_token_endpoint_to_itself_is_not_followed_either() -> None:
    with smart_server("{origin}/token", Reply(status=307, headers={"Location": "/other"})) as server:
        with pytest.raises(NotFhir):
            authorization(discover(server))
        assert [request.path for request in server.requests][-1] == "/token"


def test_a_token_endpoint_without_tls_that_the_server_names_gets_nothing() -> None:
    with smart_server("http://auth.example/token") as server:
        with pytest.raises(ConfigurationError, match=r"over TLS only.* set the token URL"):
            authorization(discover(server))
        assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["http://auth.example/token", "ftp://auth.example/token", "auth.example", "http://[x"])
def test_a_configured_token_endpoint_without_tls_gets_nothing(url: str) -> None:
    with ScriptedServer([]) as server:
        with pytest.raises(ConfigurationError, match="over TLS only"):
            authorization(discover(server, url))
        assert server.requests == []


def test_no_token_is_requested_for_a_server_without_tls() -> None:
    with ScriptedServer([reply({"access_token": "t"})]) as server:
        credentials = BackendServices(
            "http://fhir.example/r4", "client", secret="s", token_url=f"{server.origin}/token"
        )
        with pytest.raises(ConfigurationError, match="set the base URL to an address that begins with https"):
            authorization(credentials)
        assert server.requests == []


def test_another_server_does_not_name_the_token_endpoint() -> None:
    with smart_server("{origin}/token") as other:
        redirect = Reply(status=302, headers={"Location": f"{other.url}/.well-known/smart-configuration"})
        with (
            ScriptedServer(lambda request: redirect) as server,
            pytest.raises(NotFhir, match="to another server, which is not asked"),
        ):
            authorization(discover(server))
        assert other.requests == []


def test_a_redirect_of_the_configuration_on_the_same_server_is_followed() -> None:
    def answer(request: ReceivedRequest) -> Reply:
        if request.path == "/fhir/.well-known/smart-configuration":
            return Reply(status=302, headers={"Location": "/smart"})
        if request.path == "/smart":
            return reply({"token_endpoint": f"{server.origin}/token"})
        return reply({"access_token": "t"})

    with ScriptedServer(answer) as server:
        assert authorization(discover(server)) == "Bearer t"


def test_a_server_of_the_internet_names_no_token_endpoint_of_the_local_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing in this test may leave the machine, so that the server's own address is replaced where it is resolved.
    monkeypatch.setattr(smart, "resolve", lambda host: {"8.8.8.8"} if host == "127.0.0.1" else {host})
    with smart_server("https://169.254.169.254/token") as server:
        with pytest.raises(NotFhir, match="names no token endpoint"):
            authorization(discover(server))


@pytest.mark.parametrize("token", ["a\r\nX: y", "", "ä", "a b"])
def test_a_token_that_no_header_can_hold_is_an_error(token: str) -> None:
    with ScriptedServer([reply({"access_token": token})]) as server, pytest.raises(NotFhir, match="returns no token"):
        authorization(backend_services(server, Waits()))
