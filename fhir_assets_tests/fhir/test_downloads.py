"""Downloads of exported files: every line is returned once despite faults, and credentials stay with their origin."""

import gzip
import zlib
from collections.abc import Callable, Iterator

import pytest
from requests import PreparedRequest

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir.auth.credentials import Bearer, Credentials
from fhir_assets.fhir.bulk.client import BulkClient
from fhir_assets.fhir.bulk.downloads import Downloads
from fhir_assets.fhir.bulk.file_lines import FileChanged
from fhir_assets.fhir.bulk.manifest import ExportFile
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.response import HttpStatusError
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer

LINES = [b'{"resourceType":"Patient","id":"p%d","name":[{"family":"x"}]}' % n for n in range(30)]
FILE = b"\n".join(LINES) + b"\n"
_QUICK = Retrier(RetryPolicy(attempts=4, first_wait=0.001, max_wait=0.002))


def _pack_without_end(wbits: int) -> bytes:
    """Compress the first 20 lines as a stream that ends between two lines, before the rest and its trailer."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return packer.compress(b"\n".join(LINES[:20]) + b"\n") + packer.flush(zlib.Z_SYNC_FLUSH)


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
        Reply(_pack_without_end(31), headers={"Content-Encoding": "gzip"}),
        Reply(_pack_without_end(31)),
        Reply(_pack_without_end(15), headers={"Content-Encoding": "deflate"}),
        Reply(_pack_without_end(-15), headers={"Content-Encoding": "deflate"}),
        Reply(gzip.compress(_pack_without_end(31)), headers={"Content-Encoding": "gzip"}),
        Reply(gzip.compress(FILE)[:-8] + bytes(8), headers={"Content-Encoding": "gzip"}),
    ],
    ids=[
        "html",
        "ends-after-a-brace",
        "cut",
        "reset",
        "503",
        "gzip-cut",
        "gzip-without-end",
        "gzip-file-without-end",
        "zlib-without-end",
        "deflate-without-end",
        "gzip-file-without-end-in-gzip",
        "gzip-with-zeros-for-its-end",
    ],
)
@pytest.mark.parametrize("expected", [30, None])
def test_a_fault_in_the_first_attempt_loses_and_repeats_no_line(first: Reply, expected: int | None) -> None:
    with ScriptedServer([first, Reply(FILE)]) as server:
        assert download(server, expected=expected) == LINES


def test_a_file_that_ends_between_two_lines_is_recognized_by_its_count() -> None:
    with ScriptedServer([Reply(b"\n".join(LINES[:9]) + b"\n"), Reply(FILE)]) as server:
        assert download(server, expected=30) == LINES


@pytest.mark.parametrize(
    ("always", "error", "sentence"),
    [
        (Reply(b"<html>"), NotFhir, "HTML or XML"),
        (Reply(FILE[:100]), NotFhir, "middle of a line"),
        (Reply(FILE, cut=100), ServerUnavailable, "was interrupted"),
        (Reply(status=404), HttpStatusError, "404"),
    ],
    ids=["html", "half", "cut", "gone"],
)
def test_the_error_for_a_permanent_fault_names_the_fault(always: Reply, error: type[Exception], sentence: str) -> None:
    with ScriptedServer(lambda request: always) as server, pytest.raises(error, match=sentence):
        download(server)


@pytest.mark.parametrize("body", [FILE, FILE[:-1], FILE.replace(b"\n", b"\n\n"), FILE.replace(b"\n", b"\r\n")])
@pytest.mark.parametrize("compressed", [False, True])
def test_blank_lines_of_a_file_are_skipped_compressed_or_not(body: bytes, compressed: bool) -> None:
    content = Reply(gzip.compress(body), headers={"Content-Encoding": "gzip"}) if compressed else Reply(body)
    with ScriptedServer([content]) as server:
        assert [line.strip() for line in download(server, expected=30)] == LINES


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (gzip.compress(FILE), None),
        (gzip.compress(FILE) + bytes(512), "gzip"),
        (gzip.compress(FILE[:900]) + gzip.compress(FILE[900:]), "gzip"),
        (gzip.compress(gzip.compress(FILE)), "gzip"),
        (gzip.compress(gzip.compress(FILE)), "gzip, gzip"),
        (zlib.compress(FILE), "deflate"),
        (zlib.compress(FILE, wbits=-15), "deflate"),
        (b"\xef\xbb\xbf" + FILE, "identity"),
        (FILE, "gzip"),
    ],
    ids=["gzip-file", "padded", "members", "gzip-file-in-gzip", "twice", "zlib", "deflate", "marked", "header-only"],
)
def test_a_file_is_read_however_it_is_compressed(body: bytes, coding: str | None) -> None:
    headers = {"Content-Encoding": coding} if coding else {}
    with ScriptedServer([Reply(body, headers=headers)]) as server:
        assert download(server) == LINES


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_stream_that_always_ends_too_early_is_an_error(coding: str) -> None:
    body = _pack_without_end(31 if coding == "gzip" else 15)
    always = Reply(body, headers={"Content-Encoding": coding})
    with ScriptedServer(lambda request: always) as server, pytest.raises(NotFhir, match="ends too early"):
        download(server)


def test_a_coding_that_was_not_asked_for_is_named() -> None:
    always = Reply(FILE, headers={"Content-Encoding": "br"})
    with ScriptedServer(lambda request: always) as server, pytest.raises(NotFhir, match="Content-Encoding br"):
        download(server)


def test_a_file_that_broke_off_and_comes_in_another_order_is_not_resumed() -> None:
    other_order = b"\n".join(reversed(LINES)) + b"\n"
    with (
        ScriptedServer([Reply(FILE, cut=700), Reply(other_order)]) as server,
        pytest.raises(FileChanged, match="in another order"),
    ):
        download(server)


def test_a_file_that_broke_off_and_has_become_shorter_is_not_resumed() -> None:
    with ScriptedServer([Reply(FILE, cut=700), Reply(LINES[0] + b"\n")]) as server, pytest.raises(FileChanged):
        download(server)


def test_a_file_that_always_has_fewer_lines_than_its_count_is_read_to_its_end() -> None:
    with ScriptedServer(lambda request: Reply(FILE)) as server:
        assert download(server, expected=31) == LINES
        assert len(server.requests) == 3, "another request may have brought the rest"


def test_connections_are_reused_and_a_closed_connection_is_replaced() -> None:
    closes = Reply(FILE, headers={"Connection": "close"})
    with ScriptedServer(lambda request: closes if request.path.endswith("2") else Reply(FILE)) as server:
        with Downloads(FhirClient(server.url, retrier=_QUICK)) as downloads:
            for n in range(5):
                lines_of_file = downloads.read_lines(f"{server.url}/{n}", authorized=False)
                assert [line for lines in lines_of_file for line in lines] == LINES
        assert len({request.connection for request in server.requests}) == 2


@pytest.fixture
def other_server() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: Reply(FILE)) as server:
        yield server


def _redirecting(target: str) -> Callable[[ReceivedRequest], Reply]:
    return lambda request: Reply(status=302, headers={"Location": target})


def test_a_redirect_to_another_origin_is_followed_without_the_credentials(other_server: ScriptedServer) -> None:
    with ScriptedServer(_redirecting(f"{other_server.origin}/signed?x=1")) as server:
        assert download(server, credentials=Bearer("secret")) == LINES
        assert server.requests[0].headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in other_server.requests[0].headers
    assert other_server.requests[0].query == [("x", "1")]


def test_a_redirect_loop_is_an_error() -> None:
    with ScriptedServer(_redirecting("/fhir/file")) as server, pytest.raises(HttpStatusError, match="redirect loop"):
        download(server)


class _RenewableToken(Credentials):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = iter("abc")
        self.token = next(self.tokens)

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def renew(self) -> bool:
        self.token = next(self.tokens)
        return True


def test_an_expired_token_is_renewed_once_and_a_second_refusal_is_an_error() -> None:
    def answer(request: ReceivedRequest) -> Reply:
        return Reply(FILE) if request.headers["Authorization"] == "Bearer b" else Reply(status=401)

    with ScriptedServer(answer) as server:
        assert download(server, credentials=_RenewableToken()) == LINES
    with ScriptedServer(lambda request: Reply(status=401)) as server:
        with pytest.raises(HttpStatusError, match="401"):
            download(server, credentials=_RenewableToken())
        assert len(server.requests) == 2


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(lambda request: Reply(FILE)) as proxy, ScriptedServer([]) as server:
        monkeypatch.setenv("http_proxy", proxy.origin)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert download(server, "http://files.example/file", authorized=False) == LINES
        assert [request.headers["Host"] for request in proxy.requests] == ["files.example"]


def test_the_link_of_a_file_is_rewritten_from_the_link_base_to_the_base_url() -> None:
    with ScriptedServer([Reply(FILE)]) as server:
        bulk = BulkClient(FhirClient(server.url, link_base="http://internal.example/r4", retrier=_QUICK, timeout=5))
        file = ExportFile("Patient", "http://internal.example/r4/files/1?part=2", len(LINES))
        with bulk.open_downloads() as downloads:
            batches = list(bulk.read_lines(downloads, file, needs_token=False))
        assert [line for lines in batches for line in lines] == LINES
        assert (server.requests[0].path, server.requests[0].query) == ("/fhir/files/1", [("part", "2")])
