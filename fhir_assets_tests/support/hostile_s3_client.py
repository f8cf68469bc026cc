"""A process that reads and writes a hostile bucket. A task is a road and the address of the server."""

import os
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.endpoint

from fhir_assets.delivery.upload.download import download_files
from fhir_assets.deployment.s3_client import connect_s3
from fhir_assets.errors import ConfigurationError, EncryptionError, StoreError
from fhir_assets.fhir.files import formats
from fhir_assets.fhir.files.formats import LandedContent
from fhir_assets.fhir.lines import FileLimits, decompress
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage import s3
from fhir_assets.storage.aside import read_all_manifests
from fhir_assets.storage.landing_zone import BucketZone, hash_content
from fhir_assets.storage.manifest import Part
from fhir_assets.storage.orphans import find_unreferenced_parts
from fhir_assets.storage.s3 import Bucket, S3Blobs
from fhir_assets.storage.s3_limits import S3Limits
from fhir_assets.storage.store import Store
from fhir_assets_tests.support.limited_process import answer_tasks

QUICK = S3Limits(seconds=0.3, object_seconds=0.4, object_bytes=8 << 20, max_objects=9)
FILE_LIMITS = FileLimits(bytes=8 << 20)
NOW = datetime(2024, 1, 6, tzinfo=UTC)


def _landing(bucket: Bucket) -> None:
    zone = BucketZone(bucket)
    files = list(zone.files())
    for file in files:
        assert file.name == file.name.replace("\0", "")
        assert file.fault or not any(part in (".", "..") for part in file.name.split("/"))
    for file in islice((file for file in files if not file.fault), 2):
        _told(partial(hash_content, zone, file.name))
        _told(partial(_read, zone, file.name))
    zone.put("new.ndjson", b"{}")


def _read(zone: BucketZone, name: str) -> None:
    with zone.open(name) as stream:
        pieces = decompress(stream, FILE_LIMITS)
        content = LandedContent("file", pieces, NOW, 1 << 20, received=NOW, reopen=lambda: iter(()))
        for _ in formats.read(name if name.endswith(formats.SUFFIXES) else "a.ndjson", content):
            pass


def _store(bucket: Bucket) -> None:
    store = Store(S3Blobs(bucket), NO_ENCRYPTION)
    _told(lambda: store.partition_keys("raw", "Patient"))
    _told(lambda: read_all_manifests(store, "raw"))
    _told(lambda: list(find_unreferenced_parts(store, "raw", before=datetime.now(UTC) + timedelta(days=1))))
    part = Part("raw/patient/2024/part-1.ndjson.gz", 1, 200, 200)
    _told(lambda: list(store.batches([part])))
    _told(lambda: store.count_lines(part))
    _told(lambda: store.manifest("raw", "Patient", "2024"))
    store.blobs.delete("raw/x")


def _write(bucket: Bucket) -> None:
    blobs = S3Blobs(bucket)
    _told(lambda: blobs.put("small", b"content"))
    path = blobs.create_spooled(".ndjson")
    with path.open("wb") as file:
        file.truncate(6 << 20)  # in two parts
    blobs.put_file("large", path)


def _download(bucket: Bucket) -> None:
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "a" / "b" / "c"
        try:
            download_files(S3Blobs(bucket), inside, lambda file: None)
        finally:
            above = [path for path in Path(folder).rglob("*") if path.is_file() and not path.is_relative_to(inside)]
            assert not above, above


def _told(call: Callable[[], object]) -> None:
    """Call, and go on after an error of the store or of a setting."""
    try:
        call()
    except (StoreError, EncryptionError, ConfigurationError) as error:
        told = str(error)
    else:
        told = ""
    assert "canary" not in told


ROADS: dict[str, Callable[[Bucket], None]] = {
    "landing": _landing,
    "store": _store,
    "write": _write,
    "download": _download,
}


def run(task: dict[str, Any]) -> None:
    """Run a task."""
    os.environ.update(
        AWS_ENDPOINT_URL=task["url"],
        AWS_ACCESS_KEY_ID="canary-user",
        AWS_SECRET_ACCESS_KEY="canary-password",
        AWS_DEFAULT_REGION="us-east-1",
    )
    limits = QUICK if task.get("limits") is None else S3Limits(**task["limits"])
    ROADS[task["road"]](Bucket("s3://bucket/some/prefix", connect_s3, limits=limits))


if __name__ == "__main__":
    s3._MULTIPART_BYTES = 5 << 20
    botocore.endpoint.time = SimpleNamespace(sleep=lambda seconds: None)  # the waits between attempts
    answer_tasks(run)
