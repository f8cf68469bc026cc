"""The store on S3: large objects, broken connections, server-side encryption, and error messages."""

import os
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from typer.testing import CliRunner

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.cli.main import app
from fhir_assets.deployment.store import build_bucket, build_store, create_place
from fhir_assets.errors import ConfigurationError, FhirAssetsError, StoreError
from fhir_assets.settings import load_settings
from fhir_assets.storage.s3 import Bucket


@pytest.fixture
def bucket(s3_url: str) -> Bucket:
    return build_bucket(load_settings(), s3_url)


def test_a_large_part_is_uploaded_in_pieces_and_read_back_complete(bucket: Bucket, tmp_path: Path) -> None:
    content = os.urandom(40 << 20)
    (tmp_path / "file").write_bytes(content)
    bucket.upload("large", tmp_path / "file")
    head = bucket.client.head_object(Bucket=bucket.name, Key="some/prefix/large")
    assert head["ETag"].strip('"').endswith("-3")
    with bucket.open("large") as stream:
        assert stream.read(1000) == content[:1000]
        assert stream.read() == content[1000:]


class _BreakingBody:
    """A body whose connection breaks after some bytes, once."""

    def __init__(self, body: Any, after: int) -> None:
        self._body, self._left = body, after

    def read(self, count: int) -> bytes:
        if self._left <= 0:
            raise ConnectionResetError
        piece: bytes = self._body.read(min(count, self._left))
        self._left -= len(piece)
        return piece

    def close(self) -> None:
        self._body.close()


@pytest.mark.parametrize("times", [3, 99])
def test_a_stream_resumes_after_a_broken_connection_or_raises_an_error(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    content = os.urandom(1 << 20)
    bucket.put("x", content)
    get_object, ranges = bucket.client.get_object, []

    def get_breaking_object(**request: Any) -> Any:
        ranges.append(request.get("Range"))
        response = get_object(**request)
        if len(ranges) <= times:
            response["Body"] = _BreakingBody(response["Body"], 100_000 if len(ranges) < 3 else 0)
        return response

    monkeypatch.setattr(bucket.client, "get_object", get_breaking_object)
    with bucket.open("x") as stream:
        if times == 3:
            assert stream.read() == content
            assert ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=200000-"]
        else:
            with pytest.raises(StoreError, match="broke repeatedly"):
                stream.read()


def test_an_object_that_changes_during_a_read_is_an_error(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("x", b"a" * 1000)
    get_object = bucket.client.get_object
    monkeypatch.setattr(
        bucket.client,
        "get_object",
        lambda **request: {**(response := get_object(**request)), "Body": _BreakingBody(response["Body"], 10)},
    )
    with bucket.open("x") as stream:
        bucket.put("x", b"b" * 1000)
        with pytest.raises(StoreError):
            stream.read()


def test_encryption_settings_are_sent_with_every_write(s3_url: str, tmp_path: Path) -> None:
    settings = load_settings(fhir_store_url=s3_url, fhir_s3_encryption="aws:kms", fhir_s3_kms_key_id="alias/x")
    blobs = build_store(settings).blobs
    blobs.put("small", b"x")
    (tmp_path / "file").write_bytes(bytes(20 << 20))
    blobs.put_file("large", tmp_path / "file")
    name, prefix = s3_url.removeprefix("s3://").split("/", 1)
    for key in ("small", "large"):
        head = boto3.client("s3").head_object(Bucket=name, Key=f"{prefix}/{key}")
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/x")


def catch_store_error(url: str) -> FhirAssetsError:
    with pytest.raises(FhirAssetsError) as exc_info:
        build_store(load_settings(fhir_store_url=url)).manifest("raw", "Patient", "k")
    return exc_info.value


def test_a_large_object_that_cannot_be_written_leaves_the_earlier_one_and_no_parts(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ClientError({"Error": {"Code": "InternalError"}}, "CompleteMultipartUpload")

    bucket.put("x", b"before")
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(33 << 20)
    monkeypatch.setattr(bucket.client, "complete_multipart_upload", refuse)
    with pytest.raises(StoreError, match="InternalError"):
        bucket.upload("x", path)
    assert bucket.get("x") == b"before"
    assert "Uploads" not in bucket.client.list_multipart_uploads(Bucket=bucket.name)


def test_a_missing_bucket_is_a_configuration_error(s3_url: str) -> None:
    error = catch_store_error("s3://no-such-bucket-here/x")
    assert isinstance(error, ConfigurationError)
    assert str(error) == "there is no bucket no-such-bucket-here: create it, or correct s3://no-such-bucket-here/x"


def test_missing_credentials_are_a_configuration_error(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    error = catch_store_error(s3_url)
    assert isinstance(error, ConfigurationError)
    assert "AWS_ACCESS_KEY_ID" in str(error)


def test_the_error_for_an_unreachable_endpoint_names_its_variable(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{find_free_port()}")
    monkeypatch.setattr("fhir_assets.deployment.s3_client._ATTEMPTS", 1)
    error = catch_store_error(s3_url)
    assert isinstance(error, StoreError)
    assert "AWS_ENDPOINT_URL" in str(error)


def test_a_url_without_a_bucket_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not contain a bucket"):
        build_store(load_settings(fhir_store_url="s3://"))


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
def test_the_places_of_a_deployment_are_created_once(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, region: str
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    new = f"s3://new-{tmp_path.name.replace('_', '-').lower()}-{os.urandom(4).hex()}/visits"
    monkeypatch.setenv("FHIR_LANDING_URL", new)
    monkeypatch.setenv("FHIR_STORE_URL", str(tmp_path / "of" / "store"))
    printed = [CliRunner().invoke(app, ["landing", "init"], catch_exceptions=False).output for _ in range(2)]
    assert [text.count("Created") for text in printed] == [2, 0]
    assert [text.count("Exists") for text in printed] == [0, 2]
    build_bucket(load_settings(), new).put("a.csv", b"content")
    assert (tmp_path / "of" / "store").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="file/zone cannot be created"):
        create_place(load_settings(), str(tmp_path / "file" / "zone"))
