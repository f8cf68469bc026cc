"""A bucket of S3, or of anything that speaks its HTTP."""

import atexit
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, cast

from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.storage.blobs import Listed

S3Client = Any
"""boto3's client; it has no types of its own."""

READ_BYTES = 1 << 18
_RESUMES = 5
_MULTIPART_BYTES = 16 << 20


class Bucket:
    """The keys of a bucket below a prefix. Touches nothing before its first use; ``connect`` makes the client.

    ``encryption`` is passed on with every write: ``ServerSideEncryption``, ``SSEKMSKeyId``. Wrong settings are
    ConfigurationErrors (no credentials, no such bucket), everything else that fails a StoreError.
    """

    def __init__(self, url: str, connect: Callable[[], S3Client], encryption: Mapping[str, str] | None = None) -> None:
        """``url``: ``s3://bucket/prefix``."""
        name, _, prefix = url.removeprefix("s3://").partition("/")
        if not name:
            raise ConfigurationError(f"{url} names no bucket: give s3://bucket/prefix")
        self.url = url.rstrip("/")
        self.name = name
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._connect = connect
        self._encryption = dict(encryption or {})
        self._lock = Lock()
        self._client: S3Client = None

    def __reduce__(self) -> tuple[object, ...]:
        return Bucket, (self.url, self._connect, self._encryption)

    @property
    def client(self) -> S3Client:
        """The client, made when it is first needed: importing boto3 takes its time."""
        with self._lock:
            if self._client is None:
                with self.explained("be opened"):
                    self._client = self._connect()
            return self._client

    def key(self, name: str) -> str:
        """The key of a name below the prefix."""
        return self._prefix + name

    def upload(self, name: str, path: Path) -> None:
        """The file as ``name``, a large one in parts. It appears whole or not at all."""
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_MULTIPART_BYTES, multipart_chunksize=_MULTIPART_BYTES)
        with self.explained(f"take {name}"):
            self.client.upload_file(
                str(path), self.name, self.key(name), ExtraArgs=self._encryption or None, Config=config
            )

    def put(self, name: str, content: bytes) -> None:
        """The bytes as ``name``."""
        with self.explained(f"take {name}"):
            self.client.put_object(Bucket=self.name, Key=self.key(name), Body=content, **self._encryption)

    def get(self, name: str) -> bytes | None:
        """The content of ``name``, None if there is none."""
        try:
            with self.open(name) as stream:
                return stream.read()
        except _NoSuchKey:
            return None

    def open(self, name: str) -> BinaryIO:
        """``name`` as a stream, which goes on where it was when the connection breaks."""
        raw = _Stream(self, self.key(name))
        return cast(BinaryIO, io.BufferedReader(raw, READ_BYTES))

    def listing(self, prefix: str = "") -> Iterator[Mapping[str, Any]]:
        """What S3 says of each key below ``prefix``, a page at a time; ``Name`` is the name in it."""
        with self.explained("be listed"):
            for page in self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=self.key(prefix)
            ):
                for found in page.get("Contents", ()):
                    yield {**found, "Name": found["Key"].removeprefix(self._prefix)}

    def delete(self, name: str) -> None:
        """Remove ``name`` if it is there."""
        with self.explained(f"delete {name}"):
            self.client.delete_object(Bucket=self.name, Key=self.key(name))

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Errors of S3 in one sentence each; their own text may hold keys and addresses, and is left out."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            # The error of a transfer is about another error.
            cause = error.__context__ if isinstance(error, Boto3Error) else error
            raise self._explained(what, cause or error) from None

    def _explained(self, what: str, error: BaseException) -> ConfigurationError | StoreError:
        name = type(error).__name__
        answer = getattr(error, "response", None) or {}
        code = str(answer.get("Error", {}).get("Code", ""))
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"):
            return ConfigurationError(
                f"there are no credentials for {self.url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or give the machine a role"
            )
        if name in ("NoRegionError", "InvalidRegionError"):
            return ConfigurationError(f"there is no region for {self.url}: set AWS_DEFAULT_REGION")
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return ConfigurationError(f"{self.url} refuses the credentials ({code}): correct or renew them")
        if code == "NoSuchBucket":
            return ConfigurationError(f"there is no bucket {self.name}: create it, or correct {self.url}")
        if code in ("NoSuchKey", "404") or status == 404:
            return _NoSuchKey(f"{self.url} cannot {what}: it is not there")
        if code in ("AccessDenied", "403") or status == 403:
            return StoreError(
                f"{self.url} may not {what}: give the credentials s3:GetObject, s3:PutObject, s3:DeleteObject and "
                "s3:ListBucket there"
            )
        if name in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError", "SSLError"):
            return StoreError(f"{self.url} cannot be reached ({name}): see AWS_ENDPOINT_URL and the network")
        return StoreError(f"{self.url} cannot {what}: {code or name}. Run it again; what was committed is kept")


class S3Blobs:
    """The store in a bucket. Parts grow in a local folder that only this user may read, until they are uploaded."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.url = bucket.url

    def spool(self) -> Path:
        return self._spool

    @cached_property
    def _spool(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="fhir_assets_spool_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def __reduce__(self) -> tuple[object, ...]:
        return S3Blobs, (self.bucket,)

    def put_file(self, name: str, path: Path) -> None:
        self.bucket.upload(name, path)
        path.unlink()

    def put(self, name: str, content: bytes) -> None:
        self.bucket.put(name, content)

    def get(self, name: str) -> bytes | None:
        return self.bucket.get(name)

    def open(self, name: str) -> BinaryIO:
        return self.bucket.open(name)

    def names(self, prefix: str) -> Iterator[str]:
        for found in self.bucket.listing(f"{prefix.rstrip('/')}/"):
            yield found["Name"]

    def listing(self, prefix: str) -> Iterator[Listed]:
        for found in self.bucket.listing(f"{prefix.rstrip('/')}/"):
            yield Listed(found["Name"], found["Size"], found["LastModified"])

    def delete(self, name: str) -> None:
        self.bucket.delete(name)


class _NoSuchKey(StoreError):
    """A key that is not there."""


class _Stream(io.RawIOBase):
    """The bytes of a key. A connection that breaks is opened again at the byte where it broke, on the same version."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket = bucket
        self._key = key
        self._position = 0
        self._version: dict[str, str] = {}
        self._body: Any = None
        self._body = self._open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        for attempt in range(_RESUMES + 1):
            try:
                piece = self._body.read(len(buffer))
                break
            except (BotoCoreError, HTTPError, OSError) as error:
                if attempt == _RESUMES:
                    raise StoreError(
                        f"{self._bucket.url} broke off {self._key} again and again ({type(error).__name__}): "
                        "run it again"
                    ) from None
                self._body.close()
                self._body = self._open()
        self._position += len(piece)
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed and self._body is not None:
            self._body.close()
        super().close()

    def _open(self) -> Any:
        resume = {"Range": f"bytes={self._position}-", **self._version} if self._position else {}
        with self._bucket.explained(f"give {self._key}"):
            answer = self._bucket.client.get_object(Bucket=self._bucket.name, Key=self._key, **resume)
        self._version = {"IfMatch": answer["ETag"]}
        return answer["Body"]
