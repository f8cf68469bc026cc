"""The client of S3, whose requests and answers have limits.

The client of boto3 limits the wait for the next byte, reads an answer of any size into memory, and waits without end
for the headers after ``100 Continue``. Its requests are sent by the connections of ``fhir.transport`` instead.
"""

import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import boto3
import urllib3
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.config import Config
from botocore.exceptions import ConnectionClosedError, HTTPClientError
from botocore.httpsession import URLLib3Session

from fhir_assets.fhir.transport.connections import LimitedConnection, pool_classes
from fhir_assets.fhir.transport.limits import AnswerLimits, AnswerTooLarge, AnswerTooSlow, LimitExceeded
from fhir_assets.storage.s3 import S3Client
from fhir_assets.storage.s3_limits import S3Limits

_ATTEMPTS = 8
_READ_BYTES = 1 << 16
_ANSWER_BYTES = 4 << 20
"""The size of an answer that is not the content of an object. A page of a listing has 1,000 names of 1,024 bytes."""

_TIMEOUT_SECONDS = 60
_SECONDS = "FHIR_S3_SECONDS"
_DEADLINE = "fhir_assets_deadline"

_limits: ContextVar[AnswerLimits] = ContextVar("limits of the answer that is waited for")


def connect_s3(limits: S3Limits) -> S3Client:
    """Return a client of S3. Credentials, region and endpoint come from the AWS variables."""
    timeout = min(_TIMEOUT_SECONDS, limits.seconds)
    config = Config(
        retries={"max_attempts": _ATTEMPTS, "mode": "standard"}, connect_timeout=timeout, read_timeout=timeout
    )
    client = boto3.session.Session().client("s3", config=config)
    session = client._endpoint.http_session
    session._pool_classes_by_scheme = session._manager.pool_classes_by_scheme = pool_classes(_Plain, _Tls)
    client.meta.events.register("before-send.s3", _Sender(session, limits).send)
    return client


class _Sender:
    """Sends the requests of a client within limits."""

    def __init__(self, session: URLLib3Session, limits: S3Limits) -> None:
        self._session = session
        self._limits = limits

    def send(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        """Send a request, and return the answer: complete, unless it is the content of an object.

        Raises LimitExceeded, which is not tried again, and BotoCoreError.
        """
        deadline = request.context.setdefault(_DEADLINE, time.monotonic() + self._limits.seconds)
        if time.monotonic() > deadline:
            raise AnswerTooSlow(f"the attempts took more than {self._limits.seconds:g} s (see {_SECONDS})")
        # The wait for the answer "100 Continue" has no limit in botocore. It is never necessary.
        request.headers.pop("Expect", None)
        is_content, request.stream_output = request.stream_output, True
        token = _limits.set(self._content_limits() if is_content else self._answer_limits())
        try:
            response = self._session.send(request)
            if is_content and response.status_code < 300:
                return response
            return AWSResponse(response.url, response.status_code, response.headers, _Content(_read(response)))
        except HTTPClientError as error:
            cause = error.kwargs.get("error")
            raise cause if isinstance(cause, LimitExceeded) else error from None
        finally:
            _limits.reset(token)

    def _answer_limits(self) -> AnswerLimits:
        return AnswerLimits(self._limits.seconds, 4 * _ANSWER_BYTES, seconds_name=_SECONDS)

    def _content_limits(self) -> AnswerLimits:
        return AnswerLimits(
            self._limits.object_seconds,
            self._limits.object_bytes + _ANSWER_BYTES,
            self._limits.seconds,
            seconds_name="FHIR_S3_OBJECT_SECONDS",
            stall_name=_SECONDS,
            bytes_name="FHIR_S3_OBJECT_BYTES",
        )


def _read(response: AWSResponse) -> bytes:
    """Read an answer to its end. Raises AnswerTooLarge, and ConnectionClosedError if the connection breaks."""
    content = bytearray()
    try:
        while piece := response.raw.read1(_READ_BYTES, decode_content=False):
            content += piece
            if len(content) > _ANSWER_BYTES:
                raise AnswerTooLarge(f"the answer is larger than {_ANSWER_BYTES} bytes, as no answer of S3 is")
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise ConnectionClosedError(endpoint_url=response.url, error=error) from None
    finally:
        response.raw.close()
    return bytes(content)


class _Content:
    """The content of a complete answer, as botocore reads it."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def stream(self) -> Iterator[bytes]:
        """Yield the content."""
        yield self._content


class _Limited(LimitedConnection):
    """A connection whose requests have the limits of the request that is being sent."""

    def begin(self) -> None:
        """Begin to spend the limits."""
        self.limits = _limits.get()
        super().begin()


class _Plain(_Limited, urllib3.connection.HTTPConnection):
    pass


class _Tls(_Limited, urllib3.connection.HTTPSConnection):
    pass
