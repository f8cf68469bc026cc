"""Files of an export: whatever breaks on the way, every line comes once; and who gets the credentials."""

import gzip
from collections.abc import Callable, Iterator

import pytest

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir.auth.credentials import Bearer, Credentials
from fhir_assets.fhir.bulk.downloads import Downloads
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.response import HttpStatusError
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets_tests.support.scripted_server import Asked, Reply, ScriptedServer

LINES = [b'{"resourceType":"Patient","id":"p%d","name":[{"family":"x"}]}' % n for n in range(30)]
FILE = b"\n".join(LINES) + b"\n"
_QUICK = Retrier(RetryPolicy(attempts=4, first_wait=0.001, max_wait=0.002))


def download(
    server: ScriptedServer,
    url: str | None = None,
    *,
    credentials: Credentials | None = None,
    authorized: bool = True,
    expected: int | None = None,
) -> list[bytes]:
    with Downloads(FhirClient(server.url, credentials=credentials, retrier=_QUICK, timeout=5)) as downloads:
        files = downloads.read_lines(url or f"{server.url}/file", authorized=authorized, expected=expected)
        return [line for lines in files for line in lines]


@pytest.mark.parametrize(
    "first",
    [
        Reply(b"<!DOCTYPE html>\n<html>Please sign in\n</html>", headers={"Content-Type": "text/html"}),
        Reply(FILE[: FILE.index(b"}]}", 400) + 1]),
        Reply(FILE, cut=700),
        Reply(reset=True),
        Reply(status=503),
        Reply(gzip.compress(FILE)[:150], headers={"Content-Encoding": "gzip"}),
    ],
    ids=["html", "ends-after-a-brace", "cut", "reset", "503", "gzip-cut"],
)
@pytest.mark.parametrize("expected", [30, None])
def test_what_breaks_once_loses_and_doubles_no_line(first: Reply, expected: int | None) -> None:
    with ScriptedServer([first, Reply(FILE)]) as server:
        assert download(server, expected=expected) == LINES


def test_a_file_that_ends_early_between_two_lines_is_known_by_its_count() -> None:
    with ScriptedServer([Reply(b"\n".join(LINES[:9]) + b"\n"), Reply(FILE)]) as server:
        assert download(server, expected=30) == LINES


@pytest.mark.parametrize(
    ("always", "error", "sentence"),
    [
        (Reply(b"<html>"), NotFhir, "HTML or XML"),
        (Reply(FILE[:100]), NotFhir, "middle of a line"),
        (Reply(FILE, cut=100), ServerUnavailable, "broke off"),
        (Reply(status=404), HttpStatusError, "404"),
    ],
    ids=["html", "half", "cut", "gone"],
)
def test_what_never_gets_better_is_an_error_that_says_what(
    always: Reply, error: type[Exception], sentence: str
) -> None:
    with ScriptedServer(lambda asked: always) as server, pytest.raises(error, match=sentence):
        download(server)


@pytest.mark.parametrize("body", [FILE, FILE[:-1], FILE.replace(b"\n", b"\n\n"), FILE.replace(b"\n", b"\r\n")])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_comes_packed_or_not_and_its_blank_lines_are_left_out(body: bytes, packed: bool) -> None:
    content = Reply(gzip.compress(body), headers={"Content-Encoding": "gzip"}) if packed else Reply(body)
    with ScriptedServer([content]) as server:
        assert [line.strip() for line in download(server, expected=30)] == LINES


def test_one_connection_serves_many_files_and_one_that_the_server_closed_is_replaced() -> None:
    closes = Reply(FILE, headers={"Connection": "close"})
    with ScriptedServer(lambda asked: closes if asked.path.endswith("2") else Reply(FILE)) as server:
        with Downloads(FhirClient(server.url, retrier=_QUICK)) as downloads:
            for n in range(5):
                got = downloads.read_lines(f"{server.url}/{n}", authorized=False)
                assert [line for lines in got for line in lines] == LINES
        assert len({asked.connection for asked in server.asked}) == 2


@pytest.fixture
def elsewhere() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda asked: Reply(FILE)) as server:
        yield server


def _redirecting(target: str) -> Callable[[Asked], Reply]:
    return lambda asked: Reply(status=302, headers={"Location": target})


def test_a_redirect_to_another_origin_is_followed_without_the_credentials(elsewhere: ScriptedServer) -> None:
    with ScriptedServer(_redirecting(f"{elsewhere.origin}/signed?x=1")) as server:
        assert download(server, credentials=Bearer("secret")) == LINES
        assert server.asked[0].headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in elsewhere.asked[0].headers
    assert elsewhere.asked[0].query == [("x", "1")]


def test_a_redirect_in_a_circle_is_an_error() -> None:
    with ScriptedServer(_redirecting("/fhir/file")) as server, pytest.raises(HttpStatusError, match="in a circle"):
        download(server)


def test_a_token_is_not_sent_to_another_origin_without_tls(elsewhere: ScriptedServer) -> None:
    with ScriptedServer([]) as server:
        with pytest.raises(NotFhir, match="without TLS"):
            download(server, f"{elsewhere.origin}/file", credentials=Bearer("secret"))
        assert download(server, f"{elsewhere.origin}/file", credentials=Bearer("secret"), authorized=False) == LINES
    assert [asked.headers.get("Authorization") for asked in elsewhere.asked] == [None]


class _Renewed(Credentials):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = iter("abc")
        self.token = next(self.tokens)

    def __call__(self, request):  # type: ignore[no-untyped-def]
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def renew(self) -> bool:
        self.token = next(self.tokens)
        return True


def test_a_token_that_ended_is_renewed_once_and_a_refusal_after_that_is_an_error() -> None:
    def answer(asked: Asked) -> Reply:
        return Reply(FILE) if asked.headers["Authorization"] == "Bearer b" else Reply(status=401)

    with ScriptedServer(answer) as server:
        assert download(server, credentials=_Renewed()) == LINES
    with ScriptedServer(lambda asked: Reply(status=401)) as server:
        with pytest.raises(HttpStatusError, match="401"):
            download(server, credentials=_Renewed())
        assert len(server.asked) == 2


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(lambda asked: Reply(FILE)) as proxy, ScriptedServer([]) as server:
        monkeypatch.setenv("http_proxy", proxy.origin)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert download(server, "http://files.example/file", authorized=False) == LINES
        assert [asked.headers["Host"] for asked in proxy.asked] == ["files.example"]
