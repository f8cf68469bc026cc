"""Where exported files are read from, and which of their servers get credentials."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from fhir_assets.errors import ConfigurationError, FhirAssetsError, NotFhir
from fhir_assets.fhir.auth.credentials import Basic, Bearer, Credentials
from fhir_assets.fhir.bulk import downloads
from fhir_assets.fhir.bulk.downloads import Downloads
from fhir_assets.fhir.bulk.manifest import parse_manifest
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.transport.addresses import connect_publicly, is_public
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets_tests.support.fhir_clients import Clock
from fhir_assets_tests.support.scripted_server import Reply, ScriptedServer

LINE = b'{"resourceType":"Patient","id":"p"}'
_QUICK = Retrier(RetryPolicy(attempts=2, first_wait=0.001, max_wait=0.002))


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: Reply(LINE)) as scripted:
        yield scripted


@pytest.fixture
def other() -> Iterator[ScriptedServer]:
    """Another server at the address of ``server``."""
    with ScriptedServer(lambda request: Reply(LINE)) as scripted:
        yield scripted


@pytest.fixture
def private() -> Iterator[ScriptedServer]:
    """A server at a private address that is not the one of ``server``."""
    with ScriptedServer(lambda request: Reply(LINE), address="127.0.0.2") as scripted:
        yield scripted


def download(
    server: ScriptedServer,
    url: str,
    *,
    credentials: Credentials | None = None,
    origins: tuple[str, ...] = (),
    authorized: bool = True,
) -> list[bytes]:
    client = FhirClient(server.url, credentials=credentials, retrier=_QUICK, timeout=5, file_origins=origins)
    with Downloads(client) as opened:
        return [line for lines in opened.read_lines(url, authorized=authorized) for line in lines]


def authorizations(server: ScriptedServer) -> list[str | None]:
    return [request.headers.get("Authorization") for request in server.requests]


def test_a_password_is_not_sent_to_a_server_that_only_the_manifest_names(
    server: ScriptedServer, other: ScriptedServer
) -> None:
    assert download(server, f"{other.origin}/file", credentials=Basic("user", "secret")) == [LINE]
    assert authorizations(other) == [None]


def test_a_token_is_not_sent_to_a_server_that_only_the_manifest_names(
    server: ScriptedServer, other: ScriptedServer
) -> None:
    with pytest.raises(NotFhir, match="without TLS; the token is not sent"):
        download(server, f"{other.origin}/file", credentials=Bearer("secret"))
    assert other.requests == []


def test_a_token_is_not_sent_to_a_tls_server_that_only_the_manifest_names(
    server: ScriptedServer, other: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = downloads._Connection
    # The connection is made without TLS, so that the other server can read what it would get.
    monkeypatch.setattr(downloads, "_TlsConnection", lambda *args, context, **options: plain(*args, **options))
    url = other.origin.replace("http:", "https:")
    assert download(server, f"{url}/1", credentials=Bearer("secret")) == [LINE]
    assert download(server, f"{url}/2", credentials=Bearer("secret"), origins=(url,)) == [LINE]
    assert authorizations(other) == [None, "Bearer secret"]


def test_a_token_is_sent_to_a_listed_server_if_the_manifest_requires_it(
    server: ScriptedServer, other: ScriptedServer
) -> None:
    listed = (other.origin,)
    download(server, f"{other.origin}/1", credentials=Bearer("secret"), origins=listed)
    download(server, f"{other.origin}/2", credentials=Bearer("secret"), origins=listed, authorized=False)
    assert authorizations(other) == ["Bearer secret", None]


def test_a_password_is_not_sent_to_a_listed_server(server: ScriptedServer, other: ScriptedServer) -> None:
    download(server, f"{other.origin}/1", credentials=Basic("user", "secret"), origins=(other.origin,))
    assert authorizations(other) == [None]


def test_a_token_is_not_sent_to_a_listed_server_without_tls(server: ScriptedServer) -> None:
    url = "http://files.example"
    with pytest.raises(NotFhir, match="without TLS; the token is not sent"):
        download(server, f"{url}/file", credentials=Bearer("secret"), origins=(url,))


@pytest.mark.parametrize("credentials", [Bearer("secret"), Basic("user", "secret")], ids=["token", "password"])
def test_the_error_for_a_file_server_that_asks_for_credentials_names_the_setting(credentials: Credentials) -> None:
    with ScriptedServer([Reply(status=401)]) as refusing:
        redirect = Reply(status=302, headers={"Location": f"{refusing.origin}/file"})
        with (
            ScriptedServer(lambda request: redirect) as server,
            pytest.raises(ConfigurationError, match=rf"asks for .* the origins of files to {refusing.origin}"),
        ):
            download(server, f"{server.url}/file", credentials=credentials)


def test_a_token_is_not_sent_along_a_redirect_even_to_a_listed_server(other: ScriptedServer) -> None:
    redirect = Reply(status=307, headers={"Location": f"{other.origin}/signed"})
    with ScriptedServer(lambda request: redirect) as server:
        assert download(server, f"{server.url}/file", credentials=Bearer("secret"), origins=(other.origin,)) == [LINE]
        assert authorizations(server) == ["Bearer secret"]
    assert authorizations(other) == [None]


def test_credentials_are_not_sent_if_another_server_redirects_back_to_the_server(server: ScriptedServer) -> None:
    redirect = Reply(status=302, headers={"Location": f"{server.url}/Patient"})
    with ScriptedServer(lambda request: redirect) as other:
        download(server, f"{other.origin}/file", credentials=Bearer("secret"), authorized=False)
    assert authorizations(server) == [None]


def test_a_manifest_that_does_not_say_whether_it_requires_a_token_requires_none() -> None:
    manifest = {"transactionTime": "2024-01-05T00:00:00Z", "output": []}
    assert not parse_manifest(manifest, "https://fhir.example/status").needs_token
    assert parse_manifest({**manifest, "requiresAccessToken": True}, "https://fhir.example/status").needs_token


def test_a_file_at_a_private_address_is_not_requested(server: ScriptedServer, private: ScriptedServer) -> None:
    with pytest.raises(ConfigurationError, match=rf"private network.* the origins of files to {private.origin}"):
        download(server, f"{private.origin}/file")
    assert private.requests == []


def test_a_redirect_to_a_private_address_is_not_followed(private: ScriptedServer) -> None:
    redirect = Reply(status=302, headers={"Location": f"{private.origin}/latest/meta-data"})
    with ScriptedServer(lambda request: redirect) as server, pytest.raises(ConfigurationError, match="private network"):
        download(server, f"{server.url}/file")
    assert private.requests == []


def test_a_file_at_a_listed_private_address_is_read(server: ScriptedServer, private: ScriptedServer) -> None:
    assert download(server, f"{private.origin}/file", origins=(private.origin,)) == [LINE]


def test_the_address_that_was_checked_is_connected_to_even_if_the_name_changes(
    server: ScriptedServer, other: ScriptedServer, private: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    answers = iter(["127.0.0.1"])

    def rebind(host: str, *args: Any, **options: Any) -> list[Any]:
        return resolve(next(answers, "127.0.0.2") if host == "files.example" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    name = other.origin.replace("127.0.0.1", "files.example")
    assert download(server, f"{name}/file") == [LINE]
    with pytest.raises(ConfigurationError, match="private network"):
        download(server, private.origin.replace("127.0.0.2", "files.example") + "/file")
    assert private.requests == []


def test_the_name_of_a_private_address_is_not_given_to_a_proxy(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer(lambda request: Reply(LINE)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.origin)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(ConfigurationError, match="private network"):
            download(server, "http://169.254.169.254/latest/meta-data")
        assert proxy.requests == []


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "127.1.2.3",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
    ],
)
def test_addresses_of_the_local_network_are_private_in_every_form(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["2130706434", "0x7f.2", "0177.0.0.2"])
def test_an_address_in_another_notation_is_the_same_address(
    server: ScriptedServer, private: ScriptedServer, host: str
) -> None:
    with pytest.raises(FhirAssetsError, match="private network"):
        download(server, private.origin.replace("127.0.0.2", host) + "/file")
    assert private.requests == []


@pytest.mark.parametrize("form", ["{other}\\@{own}/fhir/x", "//{other}\\@{own}/fhir/x"])
def test_a_link_whose_host_libraries_read_differently_is_not_followed(
    server: ScriptedServer, other: ScriptedServer, form: str
) -> None:
    link = form.format(other=other.origin, own=server.origin.removeprefix("http://")).replace("//http:", "")
    client = FhirClient(server.url, credentials=Bearer("secret"))
    with pytest.raises(NotFhir, match="not a URL"):
        client.resolve(link, server.url)
    assert other.requests == []


@pytest.mark.parametrize("target", ["http://[bad/x", "{other}\\@{own}/x"])
def test_a_redirect_to_what_is_not_a_url_is_an_error(other: ScriptedServer, target: str) -> None:
    with ScriptedServer(lambda request: Reply(status=302, headers={"Location": location})) as server:
        location = target.format(other=other.origin, own=server.origin.removeprefix("http://"))
        with pytest.raises(NotFhir):
            download(server, f"{server.url}/file", credentials=Bearer("secret"))
        with pytest.raises(NotFhir):
            FhirClient(server.url, credentials=Bearer("secret")).get("Patient", lambda answer: None)
    assert other.requests == []


def test_the_path_of_a_file_may_have_blanks_and_signs(server: ScriptedServer) -> None:
    assert download(server, f"{server.url}/a b;c=1?x=%20&y=z z") == [LINE]
    assert server.requests[0].path == "/fhir/a%20b;c=1"


def test_the_time_of_a_connection_does_not_grow_with_the_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    tried: list[str] = []

    class Silent(socket.socket):
        def connect(self, address: Any) -> None:
            tried.append(address[0])
            clock.sleep(self.gettimeout() or 0)
            raise TimeoutError

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"8.8.{n}.8", 80)) for n in range(200)]
    monkeypatch.setattr("fhir_assets.fhir.transport.addresses.time.monotonic", lambda: clock.now)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    monkeypatch.setattr(socket, "socket", Silent)
    with pytest.raises(TimeoutError):
        connect_publicly("files.example", 80, 10, own_host="fhir.example")
    assert clock.now < 11
    assert len(tried) < 5
