"""HTTP to one FHIR server: retries, credentials, and errors in words that say what to do.

Nothing here knows searches or bulk exports; they build on it.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import NoReturn, Self, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import (
    ConnectionError,
    InvalidSchema,
    InvalidURL,
    RequestException,
    SSLError,
    Timeout,
)
from urllib3.exceptions import HTTPError, LocationParseError, MaxRetryError, NameResolutionError, ReadTimeoutError

from fhir_assets.errors import ConfigurationError, NotFhir, ServerRefused, ServerUnavailable
from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.fhir.client.capabilities import Capabilities, read_capabilities
from fhir_assets.retries import Retrier, RetryPolicy, TransientFailure, read_retry_after

T = TypeVar("T")
Params = Sequence[tuple[str, str]]

FHIR_JSON = "application/fhir+json"
FIRST_CONTACT_POLICY = RetryPolicy(attempts=4, first_wait=0.5, max_wait=4, max_retry_after=60, budget=240)
"""A server that does not even answer ``/metadata``, or never answered, is more likely a wrong setting: say so soon."""

_CHECK_URL = "is FHIR_BASE_URL right and the server up?"
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529})
_MAX_REDIRECTS = 5
_CHUNK = 1 << 18
_DEFAULT_PORT = {"http": 80, "https": 443}


class HttpStatusError(ServerRefused):
    """A ServerRefused that keeps the HTTP status, for callers to whom it means more: 410, 404, 412."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class FhirResponse:
    """What came back: the body whole and decompressed. ``url`` is where it came from, after redirects."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def date(self) -> datetime | None:
        """The server's own clock when it answered."""
        try:
            moment = parsedate_to_datetime(self.headers.get("Date", ""))
        except ValueError:
            return None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class FhirClient:
    """A FHIR server behind its base URL. Connections are kept and shared: one client serves several threads.

    ``timeout``, in seconds, bounds the wait for an answer to begin and each wait for more of it; a whole answer may
    take ten times that. Each call is made within a ``turn``, which may have it wait. Raises ConfigurationError for a
    URL that is none, or that holds credentials.
    """

    def __init__(
        self,
        base_url: str,
        *,
        credentials: Credentials | None = None,
        timeout: float = 60,
        retrier: Retrier | None = None,
        connections: int = 4,
        call_slot: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        try:
            parts = urlsplit(base_url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in _DEFAULT_PORT or not parts.hostname or parts.query or parts.fragment:
            raise ConfigurationError("FHIR_BASE_URL must be an address that begins with http:// or https://")
        if parts.username is not None or parts.password is not None:
            raise ConfigurationError(
                "FHIR_BASE_URL holds a user name or a password: move them to FHIR_AUTH_USERNAME and FHIR_AUTH_PASSWORD"
            )
        self.base_url = base_url.rstrip("/")
        self.origin = parse_origin(base_url)
        self._answered = False
        self.call_slot = call_slot
        self.credentials = credentials or Credentials()
        self.timeout = (min(10.0, timeout), timeout)
        self.retrier = retrier or Retrier()
        self.session = requests.Session()
        self.session.headers.update({"Accept": FHIR_JSON, "User-Agent": "fhir-assets"})
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=connections, pool_block=True)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go."""
        self.session.close()

    def resolve(self, link: str, page: str) -> str:
        """The absolute URL of a link that stands on ``page``. Raises NotFhir if it leads to another origin."""
        try:
            url = urljoin(page, link)
        except ValueError:
            raise NotFhir(f"{self.base_url} gives a link that is no URL: the server's paging is broken") from None
        if parse_origin(url) != self.origin:
            raise NotFhir(
                f"{self.base_url} gives links that lead to {format_origin(url)}, where they are not followed: set "
                "FHIR_BASE_URL to the address that the server knows itself by, or correct the server's own base URL"
            )
        return url

    def get(
        self,
        path: str,
        read: Callable[[FhirResponse], T],
        *,
        params: Params = (),
        headers: Mapping[str, str] | None = None,
        expect: Collection[int] = frozenset({200}),
        policy: RetryPolicy | None = None,
    ) -> T:
        """GET a path below the base, or a URL on its origin, and ``read`` the answer.

        ``read`` raises PassingFailure (as ``invalid_json_failure`` makes it) for a body that another attempt may bring
        whole. Statuses of ``expect`` are answers, all others errors: Refusal, ServerUnavailable or NotFhir.
        """

        def attempt() -> T:
            return read(self._exchange("GET", path, params, None, headers, expect))

        return self.retrier.run(self._name("GET", path), attempt, policy)

    def post(
        self,
        path: str,
        body: bytes,
        read: Callable[[FhirResponse], T],
        *,
        expect: Collection[int],
        policy: RetryPolicy | None = None,
    ) -> T:
        """POST what does no harm when done twice, and ``read`` the answer as ``get`` does.

        Statuses of ``expect`` are answers, all others errors: Refusal, ServerUnavailable or NotFhir.
        """

        def attempt() -> T:
            return read(self._exchange("POST", path, (), body, {"Content-Type": FHIR_JSON}, expect))

        return self.retrier.run(self._name("POST", path), attempt, policy)

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        params: Params = (),
        headers: Mapping[str, str] | None = None,
        expect: Collection[int] = frozenset({200, 201, 202, 204}),
        policy: RetryPolicy | None = None,
    ) -> FhirResponse:
        """Any other request, tried again like a GET: it must be one that does no harm when done twice.

        Statuses of ``expect`` are answers, all others errors: Refusal, ServerUnavailable or NotFhir.
        """
        headers = {"Content-Type": FHIR_JSON, **(headers or {})} if body is not None else headers

        def attempt() -> FhirResponse:
            return self._exchange(method, path, params, body, headers, expect)

        return self.retrier.run(self._name(method, path), attempt, policy)

    def capabilities(self) -> Capabilities:
        """What the server says of itself (``/metadata``). Raises ServerUnavailable if there is no server, NotFhir
        if something else than FHIR R4 answers.
        """
        try:
            return self.get("metadata", self._read_capabilities, policy=FIRST_CONTACT_POLICY)
        except HttpStatusError as refusal:
            if refusal.status != 404:
                raise
            raise ServerUnavailable(
                f"cannot reach a FHIR server at {self.base_url}: there is no /metadata (404); {_CHECK_URL}"
            ) from None

    def _read_capabilities(self, answer: FhirResponse) -> Capabilities:
        try:
            return read_capabilities(answer.body)
        except ValueError:
            raise invalid_json_failure(answer) from None
        except NotFhir as error:
            raise NotFhir(f"{self.base_url} {error}") from None

    def _exchange(
        self,
        method: str,
        path: str,
        params: Params,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        expect: Collection[int],
    ) -> FhirResponse:
        """One attempt: the answer, or PassingFailure, or the final error."""
        url = path if "://" in path else f"{self.base_url}/{path}"
        renewable = True
        for _ in range(_MAX_REDIRECTS):
            response, content = self._request(method, url, params, body, headers)
            status = response.status_code
            if status == 401 and renewable and self.credentials.renew():
                renewable = False
            elif response.is_redirect:
                url, params = self._redirected(response), ()
            elif status in expect:
                return FhirResponse(response.url, status, response.headers, content)
            else:
                self.raise_for_status(status, response.headers, method, path)
        raise NotFhir(f"{self._name(method, path)}: redirected in a circle; is FHIR_BASE_URL right?")

    def _request(
        self, method: str, url: str, params: Params, body: bytes | None, headers: Mapping[str, str] | None
    ) -> tuple[requests.Response, bytes]:
        if parse_origin(url) != self.origin:
            raise ValueError("the client talks to the origin of its base URL only")
        try:
            with (
                self.call_slot(),
                self.session.request(
                    method,
                    url,
                    params=list(params),
                    data=body,
                    headers=headers,
                    auth=self.credentials,
                    timeout=self.timeout,
                    allow_redirects=False,
                    stream=True,
                ) as response,
            ):
                self._answered = True
                return response, self._content(response)
        except (InvalidURL, InvalidSchema, LocationParseError):
            raise ConfigurationError("FHIR_BASE_URL is not an address that can be called: correct it") from None
        except RequestException as error:
            raise TransientFailure(
                f"cannot reach {self.base_url} : {_cause(error)}",
                advice=_CHECK_URL,
                attempts=None if self._answered else FIRST_CONTACT_POLICY.attempts,
            ) from None

    def _content(self, response: requests.Response) -> bytes:
        """The body, read under a deadline: a server that drips would otherwise hold the run for ever."""
        seconds = 10 * self.timeout[1]
        deadline = time.monotonic() + seconds
        chunks = []
        try:
            while chunk := response.raw.read1(_CHUNK, decode_content=True):
                chunks.append(chunk)
                if time.monotonic() > deadline:
                    raise TransientFailure(f"the answer was not whole after {seconds:.0f} s (FHIR_TIMEOUT_SECONDS)")
        except ReadTimeoutError:
            raise TransientFailure("the answer stopped in its middle (FHIR_TIMEOUT_SECONDS)") from None
        except HTTPError:
            raise TransientFailure("the answer broke off in its middle") from None
        return b"".join(chunks)

    def _redirected(self, response: requests.Response) -> str:
        try:
            target = urljoin(response.url, response.headers["Location"])
        except ValueError:
            raise NotFhir(f"{self.base_url} redirects to what is no URL: is FHIR_BASE_URL right?") from None
        if parse_origin(target) != self.origin or response.request.method not in ("GET", "HEAD"):
            raise NotFhir(
                f"{self.base_url} redirects to {format_origin(target)}: set FHIR_BASE_URL to the FHIR server's own "
                "address, or ask for a way around the login page or the proxy that stands before it"
            )
        return target

    def raise_for_status(self, status: int, headers: Mapping[str, str], method: str, path: str) -> NoReturn:
        """Raise what an answer of this status is: PassingFailure or Refusal."""
        if status in _PASSING_STATUS:
            raise TransientFailure(
                f"the server answered {status}",
                advice="it is overloaded or down: the next run takes up where this one ended",
                retry_after=read_retry_after(headers.get("Retry-After")),
            )
        name = self._name(method, path)
        if status == 401:
            raise HttpStatusError(f"{name}: the server answered 401: {self.credentials.remedy}", status)
        if status == 403:
            raise HttpStatusError(
                f"{name}: the server answered 403: the account of FHIR_AUTH_USERNAME or FHIR_AUTH_TOKEN lacks the "
                "right to this; grant it, or leave the type out of FHIR_RESOURCE_TYPES",
                status,
            )
        raise HttpStatusError(f"{name}: the server answered {status}{_WHY.get(status, '')}", status)

    def _name(self, method: str, path: str) -> str:
        """A request in words: no query and no id, which may be a patient's."""
        below = path.removeprefix(self.base_url).partition("?")[0].strip("/")
        first = "" if "://" in below else below.partition("/")[0]
        return f"{method} {self.base_url}/{first}".rstrip("/")


_WHY = {
    400: ": it does not understand the request; does it support this search?",
    404: ": there is nothing of that name; is FHIR_BASE_URL right, and does the server have this type?",
    405: ": it does not support this interaction",
    406: ": it does not give FHIR in JSON",
    410: ": it is gone",
    412: ": a precondition failed",
    422: ": it does not accept the content",
    501: ": it does not support this interaction",
}


def parse_origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL, as the same-origin rule compares them."""
    parts = urlsplit(url)
    return parts.scheme.lower(), (parts.hostname or "").lower(), _port(parts)


def format_origin(url: str) -> str:
    """The origin of a URL in words, without credentials, path or query."""
    scheme, host, port = parse_origin(url)
    return f"{scheme}://{host}" if port == _DEFAULT_PORT.get(scheme) else f"{scheme}://{host}:{port}"


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port or _DEFAULT_PORT.get(parts.scheme.lower())
    except ValueError:
        return None


def invalid_json_failure(answer: FhirResponse) -> TransientFailure:
    """The failure for a body that is not whole JSON: cut off, or something else, such as a login page."""
    start = answer.body[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"<"):
        kind = "HTML" if b"<html" in start.lower() or b"<!doctype" in start.lower() else "XML"
        return TransientFailure(
            f"the answer is {kind}, not FHIR in JSON",
            advice="is FHIR_BASE_URL the base of a FHIR server, without a login page before it?",
            final=NotFhir,
        )
    if not start.startswith(b"{"):
        reason = "the answer is not FHIR in JSON" if start else "the answer is empty"
        return TransientFailure(reason, advice="is FHIR_BASE_URL the base of a FHIR server?", final=NotFhir)
    return TransientFailure(
        "the answer is not whole JSON",
        advice="it is cut off or damaged on the way: a smaller FHIR_PAGE_SIZE may help",
        final=NotFhir,
    )


def _cause(error: RequestException) -> str:
    """Why a server could not be reached, without what the libraries add (URLs with their queries)."""
    if isinstance(error, SSLError):
        return "its TLS certificate or connection is not accepted (REQUESTS_CA_BUNDLE names further authorities)"
    if isinstance(error, Timeout):
        return "no answer in time (FHIR_TIMEOUT_SECONDS)"
    if isinstance(error, ConnectionError):
        inner = error.args[0] if error.args else None
        reason = inner.reason if isinstance(inner, MaxRetryError) else inner
        if isinstance(reason, NameResolutionError):
            return "its name cannot be resolved"
        if "refused" in str(reason):
            return "connection refused"
        return "the connection broke" if reason is inner else "no connection"
    return type(error).__name__
