"""Downloading the files of an export, many small ones as well as large ones.

requests takes half a millisecond of processor time for a call, which is as much as fifty resources take. Where no proxy
stands before the files, they are therefore read through the standard library's own HTTP connections.
"""

import re
import ssl
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from os.path import isdir
from threading import Lock, local
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

import orjson
import urllib3
from requests import PreparedRequest
from requests.exceptions import RequestException
from requests.structures import CaseInsensitiveDict
from requests.utils import DEFAULT_CA_BUNDLE_PATH, get_environ_proxies, requote_uri, select_proxy
from urllib3.exceptions import HTTPError

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.fhir.client.http import FhirClient, HttpStatusError, format_origin, parse_origin
from fhir_assets.retries import TransientFailure

Origin = tuple[str, str, int | None]

_CHUNK = 1 << 18
_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"Accept": "application/fhir+ndjson", "Accept-Encoding": "gzip", "User-Agent": "fhir-assets"}
_TO_QUOTE = re.compile(r"[^!-~]")
_BROKEN = (OSError, HTTPException, HTTPError, RequestException)
_WHAT = "an exported file"


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a file is, taken apart once. Raises NotFhir if it is no URL."""

    url: str
    origin: Origin
    path: str

    @classmethod
    def of(cls, url: str) -> Self:
        """The target of a URL."""
        quoted = requote_uri(url) if _TO_QUOTE.search(url) else url
        scheme, _, rest = quoted.partition("://")
        host, slash, path = rest.partition("/")
        found = cls(url, parse_origin(f"{scheme}://{host}"), f"{slash}{path}" or "/")
        if found.origin[0] not in ("http", "https") or not found.origin[1]:
            raise NotFhir("the manifest of an export names a file that is no URL: run again to ask for a new export")
        return found


@dataclass(frozen=True, slots=True)
class _Reply:
    """An answer whose body is read by ``read`` (at most so many bytes, decompressed; none at the end). ``headers``
    are those of an answer that is no file.
    """

    status: int
    headers: Mapping[str, str]
    read: Callable[[int], bytes]


class Downloads:
    """Files that a server's exports name. One serves several threads; connections are kept for the next file, and
    closed at the end of the ``with`` block.
    """

    def __init__(self, client: FhirClient) -> None:
        self._client = client
        self._kept: dict[Origin, list[HTTPConnection]] = defaultdict(list)
        self._proxied: dict[Origin, bool] = {}
        self._tls: ssl.SSLContext | None = None
        self._lock = Lock()
        self._mine = local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for connections in self._kept.values():
                for connection in connections:
                    connection.close()
            self._kept.clear()

    @contextmanager
    def share_slot(self) -> Iterator[None]:
        """Files that this thread downloads meanwhile are one call: waiting for a turn costs as much as a small file."""
        with self._client.call_slot():
            self._mine.call_slot = True
            try:
                yield
            finally:
                self._mine.call_slot = False

    def _turn(self) -> AbstractContextManager[None]:
        return nullcontext() if getattr(self._mine, "call_slot", False) else self._client.call_slot()

    def read_lines(self, url: str, *, authorized: bool, expected: int | None = None) -> Iterator[list[bytes]]:
        """The lines of a file of any size, blank ones left out, some at a time, in bounded memory.

        A connection that breaks, and a file that ends before its ``expected`` lines, is opened again, and what was
        given already is passed over. A file on another origin gets the credentials only if ``authorized``, and over
        https. Raises Refusal, ServerUnavailable or NotFhir.
        """
        given = failures = 0
        while True:
            try:
                for lines in self._lines_from(url, authorized, given):
                    given += len(lines)
                    failures = 0
                    yield lines
                if expected is None or given >= expected:
                    return
                raise TransientFailure(
                    f"the file ends after {given} of {expected} resources",
                    advice="the server's manifest and its files differ: run again to ask for a new export",
                    final=NotFhir,
                )
            except TransientFailure as failure:
                failures += 1
                self._client.retrier.wait_or_raise(f"GET {format_origin(url)}, {_WHAT}", failures, failure)

    def _lines_from(self, url: str, authorized: bool, skip: int) -> Iterator[list[bytes]]:
        """One attempt at a file, without its first ``skip`` lines."""
        try:
            with self._opened(url, authorized) as reply:
                rest = b""
                first = True
                while chunk := reply.read(_CHUNK):
                    if first and chunk.lstrip().startswith(b"<"):
                        raise TransientFailure(
                            "the file is HTML or XML, not NDJSON",
                            advice="does a proxy or a login page stand before the server's files?",
                            final=NotFhir,
                        )
                    first = False
                    head, *lines = chunk.split(b"\n")
                    rest += head
                    if lines:
                        whole = [line for line in (rest, *lines[:-1]) if line.strip()]
                        rest = lines[-1]
                        if skip >= len(whole):
                            skip -= len(whole)
                        else:
                            yield whole[skip:]
                            skip = 0
                if rest.strip() and not _is_json(rest):
                    raise TransientFailure(
                        "the file ends in the middle of a line",
                        advice="the server cuts it off: run again to ask for a new export",
                        final=NotFhir,
                    )
                if rest.strip() and not skip:
                    yield [rest]
        except _BROKEN as error:
            raise TransientFailure(f"the file broke off ({type(error).__name__})") from None

    @contextmanager
    def _opened(self, url: str, authorized: bool) -> Iterator[_Reply]:
        """The answer that holds the file, after redirects. Raises Refusal, NotFhir, PassingFailure."""
        target = _Target.of(url)
        own = self._client.origin
        trusted = {target.origin, own} if authorized else {own}
        renewable = True
        for _ in range(_MAX_REDIRECTS):
            known = target.origin in trusted
            if known and target.origin != own and target.origin[0] != "https":
                raise NotFhir(
                    f"{self._client.base_url} wants its token sent to {format_origin(url)} without TLS: this is "
                    "not done"
                )
            credentials = self._client.credentials if known else Credentials()
            with self._turn(), self._get(target, credentials) as reply:
                if reply.status == 200:
                    yield reply
                    return
                if reply.status in _REDIRECTS:
                    target = _redirected(target, reply)
                elif reply.status == 401 and known and renewable and self._client.credentials.renew():
                    renewable = False
                else:
                    self._client.raise_for_status(reply.status, reply.headers, "GET", _WHAT)
        raise HttpStatusError(f"GET {format_origin(url)}, {_WHAT}: redirected in a circle", 310)

    @contextmanager
    def _get(self, target: _Target, credentials: Credentials) -> Iterator[_Reply]:
        if self._has_proxy(target):
            with self._client.session.get(
                target.url,
                headers=_HEADERS,
                auth=credentials,
                timeout=self._client.timeout,
                allow_redirects=False,
                stream=True,
            ) as response:
                raw = response.raw
                yield _Reply(response.status_code, response.headers, lambda size: raw.read1(size, decode_content=True))
            return
        connection, answer = self._asked(target, credentials)
        try:
            headers = {} if answer.status == 200 else CaseInsensitiveDict(answer.headers.items())
            yield _Reply(answer.status, headers, _reader(answer))
        except BaseException:
            connection.close()
            raise
        if answer.isclosed():
            with self._lock:
                self._kept[target.origin].append(connection)
        else:
            connection.close()

    def _asked(self, target: _Target, credentials: Credentials) -> tuple[HTTPConnection, HTTPResponse]:
        """The connection and its answer. One that was kept may be closed by now: then there is another."""
        request = PreparedRequest()
        request.headers = CaseInsensitiveDict()
        credentials(request)
        headers = {**_HEADERS, **request.headers}
        while True:
            with self._lock:
                kept = self._kept[target.origin].pop() if self._kept[target.origin] else None
            connection = kept or self._connection(target)
            try:
                connection.request("GET", target.path, headers=headers)
                return connection, connection.getresponse()
            except BaseException as error:
                connection.close()
                if kept is None or not isinstance(error, OSError | HTTPException):
                    raise

    def _connection(self, target: _Target) -> HTTPConnection:
        scheme, host, port = target.origin
        timeout = self._client.timeout[1]
        if scheme == "http":
            return HTTPConnection(host, port, timeout=timeout)
        with self._lock:
            if self._tls is None:
                named = self._client.session.merge_environment_settings(target.url, {}, None, None, None)["verify"]
                trusted = named if isinstance(named, str) else DEFAULT_CA_BUNDLE_PATH
                self._tls = ssl.create_default_context()
                self._tls.load_verify_locations(**{"capath" if isdir(trusted) else "cafile": trusted})
        return HTTPSConnection(host, port, timeout=timeout, context=self._tls)

    def _has_proxy(self, target: _Target) -> bool:
        if target.origin not in self._proxied:
            self._proxied[target.origin] = select_proxy(target.url, get_environ_proxies(target.url)) is not None
        return self._proxied[target.origin]


def _reader(answer: HTTPResponse) -> Callable[[int], bytes]:
    if answer.headers.get("Content-Encoding"):
        packed = urllib3.HTTPResponse(body=answer, headers=dict(answer.headers), preload_content=False)
        return lambda size: packed.read(size, decode_content=True)

    def read(size: int) -> bytes:
        content = answer.read(size)
        if not content and answer.length:
            raise TransientFailure("the file broke off before its end")
        return content

    return read


def _redirected(target: _Target, reply: _Reply) -> _Target:
    found = _Target.of(urljoin(target.url, reply.headers.get("Location") or ""))
    if target.origin[0] == "https" and found.origin[0] != "https":
        raise NotFhir(
            f"{format_origin(target.url)} redirects an exported file to an address without TLS: this is not done"
        )
    return found


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True
