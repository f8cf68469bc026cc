"""The HTTP client of a FHIR server: credentials, retries, redirects, and errors whose messages say what to do.

Searches, the history and bulk exports use this client and do not belong here.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from requests.exceptions import (
    ConnectionError,
    InvalidSchema,
    InvalidURL,
    RequestException,
    SSLError,
    Timeout,
)
from urllib3.exceptions import HTTPError, LocationParseError, MaxRetryError, NameResolutionError, ReadTimeoutError

from fhir_assets.errors import ConfigurationError, NotFhir, ServerUnavailable
from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.fhir.client.capabilities import Capabilities, parse_capabilities
from fhir_assets.fhir.client.clock import ServerClock
from fhir_assets.fhir.client.limits import ClientLimits
from fhir_assets.fhir.client.links import guess_base, is_below, is_http_url, rewrite_link
from fhir_assets.fhir.client.response import FhirResponse, HttpStatusError, InternalServerError, invalid_json_failure
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels
from fhir_assets.fhir.transport.body import decode_answer, read_answer
from fhir_assets.fhir.transport.origin import DEFAULT_PORTS, format_origin, parse_origin
from fhir_assets.fhir.transport.session import Session
from fhir_assets.notices import Notices
from fhir_assets.retries import Retrier, RetryPolicy, TransientFailure, read_retry_after

T = TypeVar("T")
Params = Sequence[tuple[str, str]]

FHIR_JSON = "application/fhir+json"
FIRST_CONTACT_POLICY = RetryPolicy(attempts=4, first_wait=0.5, max_wait=4, max_retry_after=60, budget=240)
"""Few retries, for ``/metadata`` and for a server that never answered: the likely cause is a wrong setting.

A persistent client, for runs that no person waits for, uses its own policy instead: there the likely cause is an
outage.
"""

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529})
_READ_HEADERS = {"Cache-Control": "no-cache"}
"""Some servers answer a repeated search or count from a cache, HAPI for 60 seconds."""
_MAX_REDIRECTS = 5
_MAX_CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP response, before its status is checked, with its body as it was sent.

    ``is_redirect`` means that it names another address.
    """

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    is_redirect: bool = False


class FhirClient:
    """An HTTP client of one FHIR server. It keeps its connections open and may be used by several threads.

    ``timeout`` (seconds) limits the wait for the first byte of a response and for each further byte; ``limits`` are the
    limits of complete responses, of pages and of files, by default ten times the timeout. Each call is made within
    ``call_slot()``, a context manager that may block, so that the number of concurrent calls to a server is limited.
    ``labels`` are the names of the settings in messages. ``link_base`` is the address that the server uses in links
    instead of the base URL; such links are rewritten. ``file_origins`` are other servers with the files of its exports:
    they may have a private address, and get the token (never a password) if a manifest requires it. A ``persistent``
    client makes as many attempts with a server that never answered as with any other, instead of those of
    FIRST_CONTACT_POLICY. ``notices`` collects notices about the server's answers; ``clock`` is the server's clock.
    Raises ConfigurationError if ``base_url`` is not an HTTP URL or contains credentials.
    """

    def __init__(
        self,
        base_url: str,
        *,
        link_base: str = "",
        file_origins: Collection[str] = (),
        credentials: Credentials | None = None,
        timeout: float = 60,
        limits: ClientLimits | None = None,
        retrier: Retrier | None = None,
        connections: int = 4,
        call_slot: Callable[[], AbstractContextManager[None]] = nullcontext,
        labels: ServerLabels = DEFAULT_LABELS,
        persistent: bool = False,
    ) -> None:
        try:
            parts = urlsplit(base_url)
            parse_origin(base_url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.query or parts.fragment:
            raise ConfigurationError(f"{labels.base_url} must be an address that begins with http:// or https://")
        if parts.username is not None or parts.password is not None:
            raise ConfigurationError(
                f"{labels.base_url} holds a user name or a password: move them to {labels.username} and "
                f"{labels.password}"
            )
        if link_base and not is_http_url(link_base):
            raise ConfigurationError(f"{labels.link_base} must be an address that begins with http:// or https://")
        self.base_url = base_url.rstrip("/")
        self.origin = parse_origin(base_url)
        self.file_origins = frozenset(map(parse_origin, file_origins))
        self._link_base = link_base.rstrip("/")
        self.labels = labels
        self.notices = Notices()
        self.clock = ServerClock(self.notices, self.base_url)
        self._is_persistent = persistent
        self._unanswered = 0
        self._has_answered = False
        self.call_slot = call_slot
        self.credentials = credentials or Credentials(labels=labels)
        self.timeout = (min(_MAX_CONNECT_SECONDS, timeout), timeout)
        self.retrier = retrier or Retrier()
        self.limits = limits or ClientLimits(labels, timeout=timeout)
        self.session = Session(self.limits.answer, connections=connections)
        self.session.headers.update({"Accept": FHIR_JSON, "User-Agent": "fhir-assets"})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.session.close()

    def resolve(self, link: str, page_url: str) -> str:
        """Return the absolute URL of a link on ``page_url``, rewritten to the base URL if it begins with the link base.

        Raises NotFhir if it points to another origin.
        """
        try:
            url = rewrite_link(urljoin(page_url, link), self._link_base, self.base_url)
            origin = parse_origin(url)
        except ValueError:
            origin = None
        if origin is None or urlsplit(url).scheme not in ("http", "https"):
            raise NotFhir(
                f"{self.base_url} sends a link that is not a URL of http or https: the server's paging is broken"
            )
        if origin != self.origin:
            raise NotFhir(f"{self.describe_links(url)}; links to another address are not followed")
        return url

    def rewrite(self, url: str) -> str:
        """Rewrite a URL that begins with the link base to the base URL. Any other URL is returned unchanged."""
        with suppress(ValueError):
            return rewrite_link(url, self._link_base, self.base_url)
        return url

    def leads_elsewhere(self, url: str) -> bool:
        """Return whether a link points to an address that is not below the base URL, as behind some proxies."""
        return not is_below(url, self.base_url)

    def describe_links(self, url: str) -> str:
        """Return a message that names the base of a link that is not below the base URL, and the setting to change."""
        base = guess_base(url)
        return (
            f"{self.base_url} sends links that point to {base} instead of {self.base_url}: set "
            f"{self.labels.link_base} to {base} if that is the same server, so that they are rewritten to "
            f"{self.labels.base_url}, or correct the base URL in the configuration of the server or of the proxy in "
            "front of it"
        )

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
        """GET a path below the base URL, or a URL of its origin, and return the result of ``read(response)``.

        ``read`` raises TransientFailure (see ``invalid_json_failure``) for a body that may be complete on the next
        attempt. Statuses in ``expect`` are read; all others raise HttpStatusError, ServerUnavailable or NotFhir.
        """

        def attempt() -> T:
            return read(self._exchange("GET", path, params, None, headers, expect))

        return self.retrier.run(self._describe("GET", path), attempt, policy)

    def post(
        self,
        path: str,
        body: bytes,
        read: Callable[[FhirResponse], T],
        *,
        expect: Collection[int],
        policy: RetryPolicy | None = None,
    ) -> T:
        """POST a body and return the result of ``read(response)``. The request must be idempotent: it is retried.

        ``read``, ``expect`` and the errors are those of ``get``.
        """

        def attempt() -> T:
            return read(self._exchange("POST", path, (), body, {"Content-Type": FHIR_JSON}, expect))

        return self.retrier.run(self._describe("POST", path), attempt, policy)

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
        """Send a request of any method and return its response. The request must be idempotent: it is retried.

        ``expect`` and the errors are those of ``get``.
        """
        headers = {"Content-Type": FHIR_JSON, **(headers or {})} if body is not None else headers

        def attempt() -> FhirResponse:
            return self._exchange(method, path, params, body, headers, expect)

        return self.retrier.run(self._describe(method, path), attempt, policy)

    def capabilities(self) -> Capabilities:
        """Return the server's capabilities (``/metadata``).

        Raises ServerUnavailable if there is no server, and NotFhir if something other than FHIR R4 answers.
        """
        try:
            policy = None if self._is_persistent else FIRST_CONTACT_POLICY
            return self.get("metadata", self._parse_capabilities, policy=policy)
        except HttpStatusError as error:
            if error.status != 404:
                raise
            raise ServerUnavailable(
                f"cannot reach a FHIR server at {self.base_url}: there is no /metadata (404); {self._check_url}"
            ) from None

    @property
    def _check_url(self) -> str:
        return f"is {self.labels.base_url} right and the server up?"

    def _parse_capabilities(self, response: FhirResponse) -> Capabilities:
        try:
            return parse_capabilities(response.body, self.labels)
        except ValueError:
            raise invalid_json_failure(response) from None
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
        """Make one attempt, with its redirects. Raises TransientFailure or the final error."""
        url = path if "://" in path else f"{self.base_url}/{path}"
        renewable = True
        for _ in range(_MAX_REDIRECTS):
            sent = time.monotonic()
            answer = self._request(method, url, params, body, headers)
            self.clock.observe(answer.headers, time.monotonic() - sent)
            if answer.status == 401 and renewable and self.credentials.renew():
                renewable = False
            elif answer.is_redirect:
                url, params = self._redirect_target(answer, method), ()
            elif answer.status in expect:
                content = decode_answer(answer.body, answer.headers, self.limits.answer)
                return FhirResponse(answer.url, answer.status, answer.headers, content, self.labels)
            else:
                self.raise_for_status(answer.status, answer.headers, method, path)
        raise NotFhir(f"{self._describe(method, path)}: redirect loop; is {self.labels.base_url} right?")

    def _request(
        self, method: str, url: str, params: Params, body: bytes | None, headers: Mapping[str, str] | None
    ) -> Exchange:
        if parse_origin(url) != self.origin:
            raise ValueError("the client sends requests to the origin of its base URL only")
        if method == "GET":
            headers = {**_READ_HEADERS, **(headers or {})}
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
                self._has_answered = True
                content = self._read_body(response)
                return Exchange(
                    response.url, response.status_code, response.headers, content, is_redirect=response.is_redirect
                )
        except (InvalidURL, InvalidSchema, LocationParseError):
            raise ConfigurationError(f"{self.labels.base_url} is not a valid URL: correct it") from None
        except RequestException as error:
            self._unanswered += 1
            # Once all attempts of the policy have failed, further calls of a run do not wait as long again.
            is_patient = self._is_persistent and self._unanswered <= self.retrier.policy.attempts
            is_quick = not (self._has_answered or is_patient)
            advice = f"{self._check_url} A server that has not answered before is tried only a few times"
            raise TransientFailure(
                f"cannot reach {self.base_url} : {self._explain(error)}",
                advice=advice if is_quick else self._check_url,
                attempts=FIRST_CONTACT_POLICY.attempts if is_quick else None,
            ) from None

    def _read_body(self, response: requests.Response) -> bytes:
        try:
            return read_answer(lambda size: response.raw.read1(size, decode_content=False))
        except ReadTimeoutError:
            raise TransientFailure(f"the answer stopped before its end (see {self.labels.timeout})") from None
        except HTTPError:
            raise TransientFailure("the connection was lost before the end of the answer") from None

    def _redirect_target(self, answer: Exchange, method: str) -> str:
        try:
            target = urljoin(answer.url, answer.headers["Location"])
            origin = parse_origin(target)
        except ValueError:
            raise NotFhir(
                f"{self.base_url} redirects to an address that is not a URL: is {self.labels.base_url} right?"
            ) from None
        if origin != self.origin or method not in ("GET", "HEAD"):
            raise NotFhir(
                f"{self.base_url} redirects to {format_origin(target)}: set {self.labels.base_url} to the FHIR "
                "server's own address, or ask its administrator for one without a login page or a proxy in front of it"
            )
        return target

    def raise_for_status(self, status: int, headers: Mapping[str, str], method: str, path: str) -> NoReturn:
        """Raise TransientFailure for a status that may change on the next attempt, HttpStatusError for any other."""
        if status in _TRANSIENT_STATUS:
            raise TransientFailure(
                f"the server answered {status}",
                advice="it is overloaded or down: the next run continues where this one ended",
                retry_after=read_retry_after(headers.get("Retry-After")),
                final=InternalServerError if status == 500 else ServerUnavailable,
            )
        raise HttpStatusError(
            f"{self._describe(method, path)}: the server answered {status}{self._explain_status(status)}", status
        )

    def _explain_status(self, status: int) -> str:
        labels = self.labels
        match status:
            case 401:
                return f": {self.credentials.remedy}"
            case 403:
                return (
                    f": the account of {labels.username} or {labels.token} lacks the permission for this; grant it, "
                    f"or remove the type from {labels.resource_types}"
                )
            case 400:
                return (
                    ": it does not understand the request; does it support this search? If it searches this type for "
                    f"single patients only, remove the type from {labels.resource_types}, or load a bulk export"
                )
            case 404:
                return f": not found; is {labels.base_url} right, and does the server have this type?"
            case _:
                return _EXPLANATIONS.get(status, "")

    def _explain(self, error: RequestException) -> str:
        """Explain why the server could not be reached, without the text of the libraries, which contains URLs."""
        if isinstance(error, SSLError):
            return "its TLS certificate or connection is not accepted (REQUESTS_CA_BUNDLE names further authorities)"
        if isinstance(error, Timeout):
            return f"no answer in time (see {self.labels.timeout})"
        if isinstance(error, ConnectionError):
            inner = error.args[0] if error.args else None
            reason = inner.reason if isinstance(inner, MaxRetryError) else inner
            if isinstance(reason, NameResolutionError):
                return "its name cannot be resolved"
            if "refused" in str(reason):
                return "connection refused"
            return "the connection broke" if reason is inner else "no connection"
        return type(error).__name__

    def _describe(self, method: str, path: str) -> str:
        """Describe a request without its query and its id, which may be a patient's."""
        below = path.removeprefix(self.base_url).partition("?")[0].strip("/")
        first = "" if "://" in below else below.partition("/")[0]
        return f"{method} {self.base_url}/{first}".rstrip("/")


_EXPLANATIONS = {
    405: ": it does not support this interaction",
    406: ": it does not offer FHIR in JSON",
    410: ": the resource is gone",
    412: ": a precondition failed",
    422: ": it does not accept the content",
    501: ": it does not support this interaction",
}
