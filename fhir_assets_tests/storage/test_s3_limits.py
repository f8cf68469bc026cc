"""The limits of what a server of S3 may send: reads, writes and listings end with a sentence that names the limit."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fhir_assets.deployment.s3_client import connect_s3
from fhir_assets.deployment.store import create_place
from fhir_assets.errors import FhirAssetsError, StoreError, StoreUnavailable
from fhir_assets.settings import load_settings
from fhir_assets.storage.s3 import Bucket
from fhir_assets.storage.s3_limits import SMALL_OBJECT_BYTES, S3Limits
from fhir_assets_tests.support.dripping_server import create_certificate, endless, one_by_one, serve_bytes
from fhir_assets_tests.support.hostile_answers import serve_lies
from fhir_assets_tests.support.hostile_s3 import LINE, HostileS3, S3Lie

QUICK = S3Limits(seconds=0.5, object_seconds=0.5, object_bytes=1 << 20, max_objects=50)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileS3]:
    with serve_lies(HostileS3()) as hostile:
        _use(monkeypatch, hostile.origin)
        yield hostile


def _use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")


def _open(limits: S3Limits = QUICK) -> Bucket:
    return Bucket("s3://bucket/some/prefix", connect_s3, limits=limits)


def _upload(bucket: Bucket, folder: Path) -> None:
    (folder / "file").write_bytes(LINE)
    bucket.upload("x", folder / "file")


CALLS: dict[str, Callable[[Bucket, Path], object]] = {
    "read": lambda bucket, _: bucket.open("x").read(),
    "list": lambda bucket, _: list(bucket.listing()),
    "write": lambda bucket, _: bucket.put("x", b"content"),
    "upload": _upload,
}


@pytest.mark.parametrize(
    ("call", "part"),
    [("read", "header"), ("read", "body"), ("list", "body"), ("write", "header"), ("upload", "body")],
)
def test_an_answer_that_comes_byte_by_byte_ends(
    call: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = b"HTTP/1.1 200 OK\r\nETag: e\r\n" + (b"X: aa" if part == "header" else b"Content-Length: 99999\r\n\r\n")
    with serve_bytes(one_by_one(start + b" "), pause=0.01) as url:
        _use(monkeypatch, url.removesuffix("/fhir"))
        with pytest.raises(
            StoreUnavailable, match=r"incomplete after 0.5 s \(see FHIR_S3_(OBJECT_)?SECONDS\)|64 KiB"
        ) as error:
            CALLS[call](_open(), tmp_path)
    assert error.value.exit_code == 75


def test_the_limits_hold_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = create_certificate(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    start = b"HTTP/1.1 200 OK\r\nETag: e\r\nContent-Length: 5\r\n\r\n"
    with serve_bytes(lambda: [start, b"hello"], certificate=certificate) as url:
        _use(monkeypatch, url.removesuffix("/fhir"))
        assert _open(S3Limits()).get("x") == b"hello"
    with serve_bytes(one_by_one(start), pause=0.01, certificate=certificate) as url:
        _use(monkeypatch, url.removesuffix("/fhir"))
        with pytest.raises(StoreUnavailable, match="FHIR_S3_"):
            _open().get("x")


@pytest.mark.parametrize("call", ["read", "list", "write"])
def test_an_answer_without_end_ends(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_bytes(endless(b"HTTP/1.1 200 OK\r\nETag: e\r\n\r\n<a>", b"<a>" * 20_000)) as url:
        _use(monkeypatch, url.removesuffix("/fhir"))
        with pytest.raises(StoreError, match="larger than"):
            CALLS[call](_open(S3Limits(object_bytes=1 << 20)), tmp_path)


def test_a_server_that_hangs_up_after_it_asks_for_the_content_of_a_file_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fhir_assets.deployment.s3_client._ATTEMPTS", 1)
    with serve_bytes(lambda: [b"HTTP/1.1 100 Continue\r\n"]) as url:
        _use(monkeypatch, url.removesuffix("/fhir"))
        with pytest.raises(StoreUnavailable):
            _upload(_open(), tmp_path)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (S3Lie(truncated=True, token="~"), "more than 50.*FHIR_S3_MAX_OBJECTS"),
        (S3Lie(truncated=True, token="~", keys=()), "more than 50.*FHIR_S3_MAX_OBJECTS"),
        (S3Lie(truncated=True, token="same"), "where its next page is"),
        (S3Lie(truncated=True), "where its next page is"),
        (S3Lie(size="-1"), "not one of S3"),
        (S3Lie(size=None), "not one of S3"),
        (S3Lie(modified="never"), "not one of S3"),
        (S3Lie(modified="9" * 30), "not one of S3"),
        (S3Lie(body=b"<Error>" + b"<Code>" * 5000 + b"</Code>" * 5000 + b"</Error>", status=400), "not one of S3"),
    ],
)
def test_a_listing_that_cannot_be_true_is_an_error(server: HostileS3, lie: S3Lie, reason: str) -> None:
    server.lies = {"list": lie}
    with pytest.raises(StoreError, match=reason):
        list(_open(S3Limits(max_objects=50)).listing())


def test_an_answer_to_a_write_that_is_no_xml_is_an_error(server: HostileS3) -> None:
    server.lies = {"put": S3Lie(status=201, body=b"\0")}
    with pytest.raises(StoreError, match=r"not one of S3 \(ResponseParserError\)"):
        _open(S3Limits()).put("x", b"content")


def test_an_object_without_an_etag_is_read(server: HostileS3) -> None:
    server.lies = {"get": S3Lie(etag=None)}
    assert _open().get("x") == LINE


def test_a_manifest_is_not_read_without_end(server: HostileS3) -> None:
    server.lies = {"get": S3Lie(body=bytes(SMALL_OBJECT_BYTES + 1))}
    with pytest.raises(StoreError, match="as no manifest is"):
        _open(S3Limits()).get("manifest.json")


class _Cutting(HostileS3):
    """A server that breaks the connection in the middle of an object, and sends it from the start again."""

    def answer(self, head: bytes) -> Iterator[bytes]:
        body = LINE if b"range:" in head.lower() else LINE[:20]
        yield b"HTTP/1.1 200 OK\r\nETag: e\r\nContent-Length: %d\r\n\r\n%s" % (len(LINE), body)


def test_an_object_that_is_sent_from_its_start_again_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_lies(_Cutting(lies={"get": S3Lie()})) as server:
        _use(monkeypatch, server.origin)
        with pytest.raises(StoreUnavailable, match="cannot resume"):
            _open(S3Limits()).get("x")


def test_the_settings_hold_for_the_landing_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(fhir_s3_seconds=0.3, fhir_landing_url="s3://bucket/zone")
    with serve_bytes(one_by_one(b"HTTP/1.1 200 OK\r\nX: "), pause=0.01) as url:
        _use(monkeypatch, url.removesuffix("/fhir"))
        with pytest.raises(StoreUnavailable, match=r"after 0.3 s \(see FHIR_S3_SECONDS\)"):
            create_place(settings, settings.fhir_landing_url)


def test_an_address_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "not an address")
    with pytest.raises(FhirAssetsError, match="AWS_ENDPOINT_URL"):
        _open().get("x")
