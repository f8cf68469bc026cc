"""Downloads of the files of a bulk export, many small files as well as large ones.

A call to ``requests`` takes half a millisecond of processor time, as long as the download of fifty resources. Files are
therefore downloaded with ``http.client`` of the standard library, unless a proxy is configured for their URL.
"""

import re
import socket
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from os.path import isdir
from threading import Lock, local
from types import TracebackType
from typing import Self
from urllib.parse import urljoin, urlsplit

from requests import PreparedRequest
from requests.exceptions import RequestException
from requests.structures import CaseInsensitiveDict
from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies, requote_uri, select_proxy
from urllib3.exceptions import HTTPError

from fhir_assets.errors import ConfigurationError, NotFhir
from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.fhir.bulk.file_lines import ReturnedLines, split_file
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.response import HttpStatusError
from fhir_assets.fhir.transport.addresses import PrivateAddress, are_public, connect_publicly, resolve
from fhir_assets.fhir.transport.body import decode_body, limit_bytes, parse_encodings
from fhir_assets.fhir.transport.connections import LimitedConnection
from fhir_assets.fhir.transport.limits import AnswerLimits
from fhir_assets.fhir.transport.origin import Origin, format_origin, is_confidential, parse_origin
from fhir_assets.fhir.transport.session import Session
from fhir_assets.retries import TransientFailure

_CHUNK_BYTES = 1 << 18
_PROXY_CONNECTIONS = 64
_MAX_REDIRECTS = 5
_REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"Accept": "application/fhir+ndjson", "Accept-Encoding": "gzip", "User-Agent": "fhir-assets"}
_REDIRECT_LOOP = 310
"""The status of the error for a redirect loop. It is not a status of HTTP."""
_UNQUOTED = re.compile(r"[^!-~]")
_CONNECTION_ERRORS = (OSError, HTTPException, HTTPError, RequestException)
_FILE = "an exported file"


@dataclass(frozen=True, slots=True)
class _Target:
    """The parsed URL of a file."""

    url: str
    origin: Origin
    path: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse a URL. Raises NotFhir if it is not an HTTP URL."""
        try:
            origin = parse_origin(url)
            quoted = requote_uri(url) if _UNQUOTED.search(url) else url
        except (ValueError, RequestException):
            origin, quoted = ("", "", None), ""
        if origin[0] not in ("http", "https") or not origin[1] or origin[2] is None:
            raise NotFhir("the manifest of an export names a file without a URL: run again to request a new export")
        parts = urlsplit(quoted)
        return cls(url, origin, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


@dataclass(frozen=True, slots=True)
class _Response:
    """A response whose body is streamed. ``content`` is the decompressed body; it can be read once."""

    status: int
    headers: Mapping[str, str]
    content: Iterator[bytes]


class _Connection(LimitedConnection, HTTPConnection):
    """A connection that is not made to a private address, unless it is the one of ``own_host`` (see ``addresses``)."""

    own_host: str | None = None
    """The server that named the host; None if the host may have a private address."""

    def connect(self) -> None:
        """Connect, without TLS. Raises PrivateAddress or OSError."""
        if self.own_host is None:
            super().connect()
            return
        self.begin()
        self.sock = connect_publicly(self.host, self.port, self.timeout, own_host=self.own_host)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _TlsConnection(HTTPSConnection, _Connection):
    """The same with TLS: ``HTTPSConnection.connect`` calls ``_Connection.connect`` first."""


class Downloads:
    """The connections over which the files of an export are read, used in a ``with`` block.

    One instance serves several threads. Connections are kept for the next file and closed at the end of the block.

    Credentials go to the origin of the server; a token, but never a password, also goes to the client's
    ``file_origins`` if the manifest requires it, and only over TLS. Nothing is sent along a redirect to another origin.
    A file at a private address is read only if the address is the server's own, or its origin one of ``file_origins``.
    """

    def __init__(self, client: FhirClient) -> None:
        self._client = client
        self._labels = client.labels
        self._limits = client.limits.file
        self._proxy_session = Session(self._limits, connections=_PROXY_CONNECTIONS)
        self._idle: dict[Origin, list[HTTPConnection]] = defaultdict(list)
        self._proxied: dict[Origin, bool] = {}
        self._tls: ssl.SSLContext | None = None
        self._lock = Lock()
        self._thread = local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()
        self._proxy_session.close()

    @contextmanager
    def share_slot(self) -> Iterator[None]:
        """Use one call slot of the client for all files that this thread reads in the ``with`` block.

        Acquiring a slot takes as long as the download of a small file.
        """
        with self._client.call_slot():
            self._thread.has_slot = True
            try:
                yield
            finally:
                self._thread.has_slot = False

    def _call_slot(self) -> AbstractContextManager[None]:
        return nullcontext() if getattr(self._thread, "has_slot", False) else self._client.call_slot()

    def read_lines(self, url: str, *, authorized: bool, expected: int | None = None) -> Iterator[list[bytes]]:
        """Read the lines of a file of any size in batches, without blank lines, in bounded memory.

        If the connection breaks, the file is requested again, and the lines that have been returned are skipped. A file
        that has fewer than ``expected`` lines is requested again a few times; then it is accepted as it is.
        ``authorized`` is whether the manifest requires a token. Raises FileChanged, HttpStatusError, ServerUnavailable,
        NotFhir, or ConfigurationError if the file is where it is not read from.
        """
        returned = ReturnedLines()
        failures = short_reads = 0
        retrier = self._client.retrier
        started = time.monotonic()
        while True:
            try:
                for lines in returned.skip_in(self._attempt(url, authorized)):
                    returned.add(lines)
                    failures = 0
                    yield lines
                short_reads += 1
                if expected is None or returned.count >= expected or short_reads >= min(3, retrier.policy.attempts):
                    return
                raise TransientFailure(f"the file ends after {returned.count} of {expected} resources")
            except TransientFailure as failure:
                failures += 1
                if time.monotonic() - started > self._limits.seconds:
                    failure.attempts = failures
                retrier.wait_or_raise(f"GET {format_origin(url)}, {_FILE}", failures, failure)

    def _attempt(self, url: str, authorized: bool) -> Iterator[list[bytes]]:
        """Read a file once. Raises TransientFailure."""
        try:
            with self._open(url, authorized) as response:
                yield from split_file(response.content, self._client.limits.line_bytes)
        except _CONNECTION_ERRORS as error:
            raise TransientFailure(f"the download was interrupted ({type(error).__name__})") from None

    @contextmanager
    def _open(self, url: str, authorized: bool) -> Iterator[_Response]:
        """Yield the response with the file, after redirects.

        Raises HttpStatusError, NotFhir, ConfigurationError or TransientFailure.
        """
        target = first = _Target.parse(url)
        credentials = self._select_credentials(first, authorized)
        renewable = credentials is not None
        for _ in range(_MAX_REDIRECTS):
            signed = credentials if target.origin == first.origin else None
            with self._call_slot(), self._get(target, signed or Credentials(labels=self._labels)) as response:
                if response.status == 200:
                    yield response
                    return
                if response.status in _REDIRECT_STATUS:
                    target = _redirect(target, response)
                elif response.status == 401 and renewable and signed is not None and signed.renew():
                    renewable = False
                else:
                    if authorized and signed is None and response.status in (401, 403):
                        raise ConfigurationError(self._explain_missing_token(target))
                    self._client.raise_for_status(response.status, response.headers, "GET", _FILE)
        raise HttpStatusError(f"GET {format_origin(url)}, {_FILE}: redirect loop", _REDIRECT_LOOP)

    def _select_credentials(self, target: _Target, authorized: bool) -> Credentials | None:
        """Return the credentials for a file, None if none are sent. Raises NotFhir."""
        credentials = self._client.credentials
        if target.origin == self._client.origin:
            return credentials
        if not (authorized and credentials.is_token):
            return None
        is_listed = target.origin in self._client.file_origins
        if target.origin[0] != "https" and not (is_listed and is_confidential(target.origin)):
            raise NotFhir(
                f"{self._client.base_url} requires its token at {format_origin(target.url)} without TLS; the token is "
                f"not sent there: ask the server's administrator for links that begin with https://"
            )
        return credentials if is_listed else None

    def _explain_missing_token(self, target: _Target) -> str:
        origin, labels = format_origin(target.url), self._labels
        if not self._client.credentials.is_token:
            return (
                f"{self._client.base_url} has the files of an export at {origin}, which asks for credentials; a user "
                f"name and a password are sent to the server itself only: set {labels.token}, and "
                f"{labels.file_origins} to {origin} if it belongs to the server"
            )
        return (
            f"{self._client.base_url} has the files of an export at {origin}, which asks for its token; the token is "
            f"not sent to other servers: set {labels.file_origins} to {origin} if it belongs to the server"
        )

    def _may_be_private(self, target: _Target) -> bool:
        return target.origin[1] == self._client.origin[1] or target.origin in self._client.file_origins

    def _refuse_private(self, target: _Target) -> ConfigurationError:
        origin = format_origin(target.url)
        return ConfigurationError(
            f"{self._client.base_url} has the files of an export at {origin}, an address of a private network, which "
            f"is not connected to: set {self._labels.file_origins} to {origin} if it belongs to the server"
        )

    @contextmanager
    def _get(self, target: _Target, credentials: Credentials) -> Iterator[_Response]:
        if self._has_proxy(target):
            if not (self._may_be_private(target) or are_public(resolve(target.origin[1]))):
                raise self._refuse_private(target)
            with self._proxy_session.get(
                target.url,
                headers=_HEADERS,
                auth=credentials,
                timeout=self._client.timeout,
                allow_redirects=False,
                stream=True,
            ) as proxied:
                raw = proxied.raw
                content = _decode(lambda size: raw.read1(size, decode_content=False), proxied.headers, self._limits)
                yield _Response(proxied.status_code, proxied.headers, content)
            return
        connection, response = self._request(target, credentials)
        try:
            headers = CaseInsensitiveDict(response.headers.items())
            yield _Response(response.status, headers, _decode(_body_reader(response), headers, self._limits))
        except BaseException:
            connection.close()
            raise
        if response.isclosed():
            with self._lock:
                self._idle[target.origin].append(connection)
        else:
            connection.close()

    def _request(self, target: _Target, credentials: Credentials) -> tuple[HTTPConnection, HTTPResponse]:
        """Send a request. If the server has closed an idle connection, another connection is used."""
        request = PreparedRequest()
        request.headers = CaseInsensitiveDict()
        credentials(request)
        headers = {**_HEADERS, **request.headers}
        while True:
            with self._lock:
                idle = self._idle[target.origin].pop() if self._idle[target.origin] else None
            connection = idle or self._connect(target)
            try:
                connection.request("GET", target.path, headers=headers)
                return connection, connection.getresponse()
            except BaseException as error:
                connection.close()
                if idle is None or not isinstance(error, OSError | HTTPException):
                    raise

    def _connect(self, target: _Target) -> HTTPConnection:
        scheme, host, port = target.origin
        timeout = self._client.timeout[1]
        connection = (
            _Connection(host, port, timeout=timeout)
            if scheme == "http"
            else _TlsConnection(host, port, timeout=timeout, context=self._tls_context(target))
        )
        connection.limits = self._limits
        if not self._may_be_private(target):
            connection.own_host = self._client.origin[1]
        try:
            connection.connect()
        except PrivateAddress:
            raise self._refuse_private(target) from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _tls_context(self, target: _Target) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                configured = self._client.session.merge_environment_settings(target.url, {}, None, None, None)["verify"]
                authorities = configured if isinstance(configured, str) else DEFAULT_CA_BUNDLE_PATH
                self._tls = ssl.create_default_context()
                self._tls.load_verify_locations(**{"capath" if isdir(authorities) else "cafile": authorities})
            return self._tls

    def _has_proxy(self, target: _Target) -> bool:
        if target.origin not in self._proxied:
            self._proxied[target.origin] = select_proxy(target.url, get_environ_proxies(target.url)) is not None
        return self._proxied[target.origin]


def _decode(read: Callable[[int], bytes], headers: Mapping[str, str], limits: AnswerLimits) -> Iterator[bytes]:
    codings = parse_encodings(headers.get("Content-Encoding"))
    yield from limit_bytes(decode_body(read, codings, may_be_empty=headers.get("Content-Length") == "0"), limits)


def _body_reader(response: HTTPResponse) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        content = response.read(size)
        if not content and response.length:
            raise TransientFailure("the download was interrupted before the end of the file")
        return content

    return read


def _redirect(target: _Target, response: _Response) -> _Target:
    try:
        url = urljoin(target.url, response.headers.get("Location") or "")
    except ValueError:
        url = ""
    redirected = _Target.parse(url)
    if target.origin[0] == "https" and redirected.origin[0] != "https":
        raise NotFhir(
            f"{format_origin(target.url)} redirects an exported file to an address without TLS, which is not followed"
        )
    return redirected
