"""Files in a bucket of S3 or of a compatible service."""

import atexit
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, cast

from fhir_assets.atomic_files import UNFINISHED
from fhir_assets.errors import ConfigurationError, FileMissing, ServerUnavailable, StoreError, StoreUnavailable
from fhir_assets.file_modes import PRIVATE
from fhir_assets.foreign_errors import translate_s3_error
from fhir_assets.retries import TransientFailure
from fhir_assets.storage.blobs import ListedFile
from fhir_assets.storage.s3_limits import SMALL_OBJECT_BYTES, S3Limits, Waits

S3Client = Any
"""The S3 client of boto3, which has no static types."""

READ_BYTES = 1 << 18
_RESUMES = 5
_MULTIPART_BYTES = 16 << 20
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
DEFAULT_LIMITS = S3Limits()


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object in a listing: its name below the prefix, its size in bytes, its time of modification, its ETag."""

    name: str
    bytes: int
    modified: datetime
    etag: str


class Bucket:
    """The objects of a bucket below a prefix. ``connect`` creates the client at the first use.

    ``encryption`` is sent with every write: ``ServerSideEncryption``, ``SSEKMSKeyId``. Methods raise ConfigurationError
    for wrong settings (no credentials, no such bucket, a wrong clock) and StoreError for every other failure.
    """

    def __init__(
        self,
        url: str,
        connect: Callable[[S3Limits], S3Client],
        encryption: Mapping[str, str] | None = None,
        *,
        limits: S3Limits = DEFAULT_LIMITS,
    ) -> None:
        """Take the bucket and the prefix from ``url``, ``s3://bucket/prefix``. Raises ConfigurationError."""
        name, _, prefix = url.removeprefix("s3://").partition("/")
        if not name:
            raise ConfigurationError(f"{url} does not contain a bucket: set s3://bucket/prefix")
        self.url = url.rstrip("/")
        self.name = name
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._connect = connect
        self._encryption = dict(encryption or {})
        self.limits = limits
        self._lock = Lock()
        self._client: S3Client = None

    def __reduce__(self) -> tuple[object, ...]:
        return _build_bucket, (self.url, self._connect, self._encryption, self.limits)

    @property
    def client(self) -> S3Client:
        """The client, created at the first use, because importing boto3 is slow."""
        with self._lock:
            if self._client is None:
                with self.translate_errors("open the bucket"):
                    self._client = self._connect(self.limits)
            return self._client

    def create(self) -> bool:
        """Create the bucket unless it exists, in the region of the client. Return whether it was created."""
        with self.translate_errors("list the buckets"):
            if any(bucket["Name"] == self.name for bucket in self.client.list_buckets()["Buckets"]):
                return False
        region = self.client.meta.region_name
        location = {} if region in (None, "us-east-1") else {"LocationConstraint": region}
        with self.translate_errors("create the bucket"):
            self.client.create_bucket(Bucket=self.name, **({"CreateBucketConfiguration": location} if location else {}))
        return True

    def key(self, name: str) -> str:
        """Return the key of a name: the prefix and the name."""
        return self._prefix + name

    def upload(self, name: str, path: Path) -> None:
        """Upload a file as ``name``, a large file in several parts. It appears complete or not at all."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_MULTIPART_BYTES, multipart_chunksize=_MULTIPART_BYTES)
        with self.translate_errors(f"write {name}"):
            self.client.upload_file(
                str(path), self.name, self.key(name), ExtraArgs=self._encryption or None, Config=config
            )

    def put(self, name: str, content: bytes) -> None:
        """Upload bytes as ``name``."""
        with self.translate_errors(f"write {name}"):
            self.client.put_object(Bucket=self.name, Key=self.key(name), Body=content, **self._encryption)

    def get(self, name: str) -> bytes | None:
        """Return the content of ``name``, which is small, or None if it does not exist."""
        try:
            with self.open(name) as stream:
                content = stream.read(SMALL_OBJECT_BYTES + 1)
        except FileMissing:
            return None
        if len(content) > SMALL_OBJECT_BYTES:
            raise StoreError(f"{self.url}/{name} is larger than {SMALL_OBJECT_BYTES} bytes, as no manifest is")
        return content

    def open(self, name: str, *, called: str | None = None) -> BinaryIO:
        """Open ``name`` for reading. The stream resumes after a broken connection. Errors say ``called`` instead."""
        raw = _Stream(self, self.key(name), called or self.key(name))
        return cast(BinaryIO, io.BufferedReader(raw, READ_BYTES))

    def listing(self, prefix: str = "") -> Iterator[ListedObject]:
        """Yield the objects below ``prefix``.

        Raises StoreError, also if the listing has no end or names objects that are not below ``prefix``.
        """
        action = f"list the objects in {self.url}"
        client, waits = self.client, Waits(self.limits, action)
        request = {"Bucket": self.name, "Prefix": self.key(prefix)}
        tokens: set[int] = set()
        count = 0
        while True:
            with self.translate_errors("list the objects"):
                with waits.wait():
                    page = client.list_objects_v2(**request)
                entries = [self._describe(entry, request["Prefix"]) for entry in page.get("Contents", ())]
            yield from entries
            count += len(entries) or 1
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated"):
                return
            if not token or hash(token) in tokens:
                raise StoreError(f"cannot {action}: the server does not say where its next page is")
            if count >= self.limits.max_objects:
                raise StoreError(
                    f"cannot {action}: there are more than {self.limits.max_objects} (see FHIR_S3_MAX_OBJECTS)"
                )
            tokens.add(hash(token))
            request["ContinuationToken"] = token

    def _describe(self, entry: Mapping[str, Any], prefix: str) -> ListedObject:
        """Return an entry of a listing. Raises ValueError, KeyError and others if it is malformed."""
        key, size, modified = entry["Key"], entry["Size"], entry["LastModified"]
        if not key.startswith(prefix) or not 0 <= size < 2**63:
            raise ValueError("not an object below the prefix")
        return ListedObject(key.removeprefix(self._prefix), size, modified.astimezone(UTC), entry["ETag"].strip('"'))

    def delete(self, name: str) -> None:
        """Delete ``name`` if it exists."""
        with self.translate_errors(f"delete {name}"):
            self.client.delete_object(Bucket=self.name, Key=self.key(name))

    @contextmanager
    def translate_errors(self, action: str) -> Iterator[None]:
        """Translate errors of S3. The messages leave out the text of S3, which may contain keys and addresses.

        An answer that is not one of S3 ends in botocore with any error of Python.
        """
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            # An error of a transfer wraps the error of S3.
            cause = (error.__context__ if isinstance(error, Boto3Error) else None) or error
            raise translate_s3_error(cause, action=action, url=self.url, bucket=self.name) or error from None
        except TransientFailure as failure:
            raise self._limit_error(action, failure) from None
        except (ResponseParserError, *_MALFORMED) as error:
            raise StoreError(
                f"cannot {action} in {self.url}: the answer is not one of S3 ({type(error).__name__}). Check "
                "AWS_ENDPOINT_URL"
            ) from None

    @contextmanager
    def translate_failures(self, action: str) -> Iterator[None]:
        """Translate what is beyond a limit only."""
        try:
            yield
        except TransientFailure as failure:
            raise self._limit_error(action, failure) from None

    def _limit_error(self, action: str, failure: TransientFailure) -> StoreError:
        if failure.final is ServerUnavailable:
            return StoreUnavailable(f"cannot {action} in {self.url}: {failure}. Run it again later")
        return StoreError(f"cannot {action} in {self.url}: {failure}{failure.advice and f' ({failure.advice})'}")


def _build_bucket(
    url: str, connect: Callable[[S3Limits], S3Client], encryption: Mapping[str, str], limits: S3Limits
) -> Bucket:
    return Bucket(url, connect, encryption, limits=limits)


class S3Blobs:
    """Files in a bucket. Parts are written to a local folder that only this user may read, then uploaded."""

    local = False

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.url = bucket.url

    def spool(self) -> Path:
        """Return a temporary folder that only this user may read."""
        return self._spool

    def create_spooled(self, suffix: str) -> Path:
        """Create an empty file in the temporary folder."""
        path = self._spool / f"{os.urandom(8).hex()}{suffix}{UNFINISHED}"
        path.touch(PRIVATE, exist_ok=False)
        return path

    def remove_spool(self) -> None:
        """Do nothing: the temporary folder is not in the bucket, and is removed when the process ends."""

    @cached_property
    def _spool(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="fhir_assets_spool_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def __reduce__(self) -> tuple[object, ...]:
        return S3Blobs, (self.bucket,)

    def put_file(self, name: str, path: Path) -> None:
        """Upload the local file ``path`` as ``name`` and delete it. Raises StoreError."""
        self.bucket.upload(name, path)
        path.unlink()

    def put(self, name: str, content: bytes) -> None:
        """Write or replace ``name`` atomically. Raises StoreError."""
        self.bucket.put(name, content)

    def get(self, name: str) -> bytes | None:
        """Return the content of ``name``, or None if it does not exist. Raises StoreError."""
        return self.bucket.get(name)

    def open(self, name: str) -> BinaryIO:
        """Open ``name`` for reading. Raises StoreError."""
        return self.bucket.open(name)

    def names(self, prefix: str) -> Iterator[str]:
        """Yield every name below the folder ``prefix``."""
        for entry in self.bucket.listing(f"{prefix.rstrip('/')}/"):
            yield entry.name

    def listing(self, prefix: str) -> Iterator[ListedFile]:
        """Yield the files below the folder ``prefix`` with sizes and times."""
        for entry in self.bucket.listing(f"{prefix.rstrip('/')}/" if prefix else ""):
            yield ListedFile(entry.name, entry.bytes, entry.modified)

    def delete(self, name: str) -> None:
        """Delete ``name`` if it exists."""
        self.bucket.delete(name)


class _Stream(io.RawIOBase):
    """The content of an object. A broken connection is resumed at the next byte of the same version of the object."""

    def __init__(self, bucket: Bucket, key: str, called: str) -> None:
        self._bucket = bucket
        self._key = key
        self._called = called
        self._position = 0
        self._version: str | None = None
        self._waits = Waits(bucket.limits, f"read {called} in {bucket.url}")
        self._body: Any = None
        self._body = self._open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        for attempt in range(_RESUMES + 1):
            try:
                with self._bucket.translate_failures(f"read {self._called}"), self._waits.wait():
                    piece = self._body.read(len(buffer))
                break
            except (BotoCoreError, HTTPError, OSError) as error:
                if attempt == _RESUMES:
                    raise StoreUnavailable(
                        f"the connection to {self._bucket.url} broke repeatedly while {self._called} was read "
                        f"({type(error).__name__}): run it again"
                    ) from None
                self._body.close()
                self._body = self._open()
        self._waits.receive(len(piece))
        self._position += len(piece)
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed and self._body is not None:
            self._body.close()
        super().close()

    def _open(self) -> Any:
        request = {"Bucket": self._bucket.name, "Key": self._key}
        if self._position:
            request["Range"] = f"bytes={self._position}-"
            request["IfMatch"] = self._version or ""
        client = self._bucket.client
        with self._bucket.translate_errors(f"read {self._called}"), self._waits.wait():
            response = client.get_object(**request)
        # A server may know neither header, and send the whole content, or that of another version.
        started = str(response.get("ContentRange", "bytes 0-")).startswith(f"bytes {self._position}-")
        version = response.get("ETag")
        if self._position and not (started and version and version == self._version):
            response["Body"].close()
            raise StoreUnavailable(
                f"the connection to {self._bucket.url} broke while {self._called} was read, and the server cannot "
                "resume it: run it again"
            )
        self._version = version
        return response["Body"]
