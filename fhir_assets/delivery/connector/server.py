"""The connector's calls of the FHIR server, without retries, over pooled connections.

A call returns a reply or raises a transient or a permanent failure. Retries are scheduled in the outbox, so that a
wait does not occupy a worker. urllib3 is used because it needs half the CPU time of requests for each call.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import msgspec
import orjson
import urllib3
from requests import PreparedRequest
from requests.structures import CaseInsensitiveDict

from fhir_assets import retries
from fhir_assets.errors import ConfigurationError, NotFhir, ServerRefused, TransientError
from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels
from fhir_assets.fhir.outcome import summarize_issues
from fhir_assets.fhir.transport.body import decode_answer, read_answer
from fhir_assets.fhir.transport.connections import limit_pools
from fhir_assets.fhir.transport.limits import ANSWER_TIMEOUTS, AnswerLimits, AnswerTooLarge, AnswerTooSlow
from fhir_assets.fhir.transport.session import Answer
from fhir_assets.metrics import connector as metrics
from fhir_assets.retries import read_retry_after

FHIR_JSON = "application/fhir+json"

_TRANSIENT_STATUSES = frozenset({401, 403, 408, 409, 423, 425, 429})
_SERVER_WIDE_STATUSES = frozenset({401, 403, 429, 503})
_PERMANENT_SERVER_ERRORS = frozenset({501, 505})
_REFERENCED_ATTEMPTS = 5
"""Attempts of a deletion that the server answers with 409 and the element that refers to the resource.

What refers to it may be deleted soon after it, for example by a change of the same transaction.
"""

_CONFLICT_ATTEMPTS = 10
"""Attempts of a deletion that the server answers with 409 and no such element. HAPI answers a version conflict so."""

_LARGE_ATTEMPTS = 3
"""Attempts of a change that the server answers with more than the limit of an answer."""

_log = logging.getLogger(__name__)


class TransientFailure(Exception):
    """A call failed, and a later attempt may succeed.

    ``server_wide`` is whether the failure concerns all records. ``retry_after`` is in seconds. ``attempts`` limits the
    attempts of one change; without it the limit of the connector applies.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        server_wide: bool,
        retry_after: float | None = None,
        attempts: int | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.server_wide = server_wide
        self.retry_after = retry_after
        self.attempts = attempts


class PermanentFailure(Exception):
    """A call failed, and a later attempt would fail too.

    ``reason`` is a short label for metrics; the message contains no patient data.
    """

    def __init__(self, reason: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


@dataclass(frozen=True, slots=True)
class Reply:
    """A response of the server: status, headers, and the parsed body (None if empty)."""

    status: int
    headers: Mapping[str, str]
    body: object


class FhirServer:
    """The FHIR server at ``base_url``. Safe for use by several threads.

    ``timeout`` (seconds) limits each wait for the server; ``limits`` are those of a complete response, by default ten
    times the timeout.
    """

    def __init__(
        self,
        base_url: str,
        credentials: Credentials,
        *,
        timeout: float,
        connections: int,
        labels: ServerLabels = DEFAULT_LABELS,
        limits: AnswerLimits | None = None,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"{labels.base_url} must be an address that begins with http:// or https://")
        self._labels = labels
        self.base_url = base_url.rstrip("/")
        self._credentials = credentials
        self._conditional_creates: frozenset[str] | None = None
        self._pool = urllib3.PoolManager(
            maxsize=connections, block=True, timeout=urllib3.Timeout(connect=min(10.0, timeout), read=timeout)
        )
        self._limits = limits or AnswerLimits(ANSWER_TIMEOUTS * timeout)
        limit_pools(self._pool, self._limits)

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def creates_conditionally(self, resource_type: str) -> bool:
        """Return whether the server says that it supports conditional create. False if it does not answer."""
        if self._conditional_creates is None:
            try:
                statement = self.call("GET", "metadata").body
            except (TransientFailure, PermanentFailure):
                return False
            self._conditional_creates = _read_conditional_creates(statement)
        return resource_type in self._conditional_creates

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        if_match: str | None = None,
        if_none_exist: str | None = None,
        absent: frozenset[int] = frozenset(),
    ) -> Reply:
        """Send one request and return its reply. A status in ``absent`` is a reply too, not a failure.

        ``if_match`` is the version that the resource must have, ``if_none_exist`` the value of the search parameter
        ``identifier`` that no resource may have. The status alone does not confirm that the server executed the
        request: see ``confirmation``. Raises TransientFailure or PermanentFailure.
        """
        url = f"{self.base_url}/{path}"
        if query:
            url += "?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
        conditions = {}
        if if_match is not None:
            conditions["If-Match"] = f'W/"{if_match}"'
        if if_none_exist is not None:
            conditions["If-None-Exist"] = f"identifier={quote(if_none_exist, safe='')}"
        started = time.perf_counter()
        result: int | str = "no answer"
        try:
            response = self._send(method, url, body, conditions)
            if response.status == 401 and self._credentials.renew():
                response = self._send(method, url, body, conditions)
            result = response.status
        except urllib3.exceptions.HTTPError as error:
            result = code = _code(error)
            metrics.CALL_ERRORS.labels(method=method, code=code).inc()
            raise TransientFailure(code, f"the FHIR server cannot be reached ({code})", server_wide=True) from None
        except AnswerTooLarge as error:
            # The server may have executed the request, but another attempt would get the same answer.
            result = code = "too-large"
            metrics.CALL_ERRORS.labels(method=method, code=code).inc()
            raise TransientFailure(code, _describe_limit(error), server_wide=False, attempts=_LARGE_ATTEMPTS) from None
        except retries.TransientFailure as error:
            result = code = "timeout" if isinstance(error, AnswerTooSlow) else "broken-off"
            metrics.CALL_ERRORS.labels(method=method, code=code).inc()
            raise TransientFailure(code, _describe_limit(error), server_wide=True) from None
        except (TransientError, ServerRefused, NotFhir, ConfigurationError) as error:
            metrics.CALL_ERRORS.labels(method=method, code="token").inc()
            raise TransientFailure("token", f"no token: {error}", server_wide=True) from None
        finally:
            seconds = time.perf_counter() - started
            metrics.CALL_LATENCY.labels(method=method).observe(seconds)
            _log.info(
                "called the FHIR server",
                extra={"worker_id": threading.current_thread().name, "call": _describe_call(method, path, query,
                       if_none_exist), "result": result, "milliseconds": round(seconds * 1000, 1)},
            )  # fmt: skip
        if response.status == 412 and if_match is not None and 412 not in absent:
            raise TransientFailure("changed", "the resource was changed at the same time", server_wide=False)
        return self._classify(method, response, absent, conditional=bool(query or if_none_exist))

    def _send(self, method: str, url: str, body: bytes | None, conditions: Mapping[str, str]) -> Answer:
        request = PreparedRequest()
        request.headers = CaseInsensitiveDict({"Accept": FHIR_JSON, "User-Agent": "fhir-assets", **conditions})
        if method == "GET":
            # HAPI, for example, answers searches from a cache for up to a minute.
            request.headers["Cache-Control"] = "no-cache"
        if body is not None:
            request.headers["Content-Type"] = FHIR_JSON
        self._credentials(request)
        return self._read(
            self._pool.request(
                method,
                url,
                body=body,
                headers=dict(request.headers),
                retries=False,
                redirect=False,
                preload_content=False,
            )
        )

    def _read(self, response: urllib3.BaseHTTPResponse) -> Answer:
        """Read a response to its end within the limits."""
        try:
            raw = read_answer(lambda size: response.read1(size, decode_content=False))
        except BaseException:
            response.close()
            raise
        finally:
            response.release_conn()
        try:
            content = decode_answer(raw, response.headers, self._limits)
        except NotFhir as error:
            raise retries.TransientFailure(str(error)) from None
        return Answer(response.status, response.headers, content)

    def _classify(self, method: str, response: Answer, absent: frozenset[int], *, conditional: bool) -> Reply:
        status = response.status
        if status < 300 or status in absent:
            try:
                parsed = orjson.loads(response.body) if response.body else None
            except orjson.JSONDecodeError:
                if status >= 300:
                    return Reply(status, response.headers, None)
                metrics.CALL_ERRORS.labels(method=method, code="not-json").inc()
                raise TransientFailure("not-json", "the response is not complete JSON", server_wide=False) from None
            return Reply(status, response.headers, parsed)
        metrics.CALL_ERRORS.labels(method=method, code=str(status)).inc()
        if status < 400:
            raise TransientFailure(
                str(status), f"the FHIR server redirects: correct {self._labels.base_url}", server_wide=True
            )
        issues = ", ".join(summarize_issues(response.body))
        if status == 409 and method == "DELETE":
            raise TransientFailure(
                "still-referenced",
                f"the FHIR server refused the deletion with 409{f': {issues}' if issues else ''}: other resources may "
                "still refer to the resource. Delete them, then replay this change",
                server_wide=False,
                attempts=_REFERENCED_ATTEMPTS if " at " in issues else _CONFLICT_ATTEMPTS,
                status=status,
            )
        if status in _TRANSIENT_STATUSES or (status >= 500 and status not in _PERMANENT_SERVER_ERRORS):
            raise TransientFailure(
                str(status),
                f"the FHIR server answered {status}",
                status=status,
                server_wide=status in _SERVER_WIDE_STATUSES,
                retry_after=read_retry_after(response.headers.get("Retry-After")),
            )
        if status == 412 and conditional:
            raise PermanentFailure(
                "several-matches", "the FHIR server has several resources with this identifier", status
            )
        raise PermanentFailure("refused", f"the FHIR server answered {status}{f': {issues}' if issues else ''}", status)


def _describe_limit(error: retries.TransientFailure) -> str:
    return f"{error.reason}; {error.advice}" if error.advice else error.reason


def _read_conditional_creates(statement: object) -> frozenset[str]:
    """Return the resource types for which a CapabilityStatement offers conditional create."""
    try:
        rests = msgspec.convert(statement, _CapabilityStatement).rest
    except msgspec.ValidationError:
        return frozenset()
    return frozenset(resource.type for rest in rests for resource in rest.resource if resource.conditional_create)


class _Resource(msgspec.Struct, rename="camel"):
    type: str
    conditional_create: bool = False


class _Rest(msgspec.Struct):
    resource: list[_Resource] = []


class _CapabilityStatement(msgspec.Struct):
    rest: list[_Rest] = []


def _describe_call(method: str, path: str, query: Mapping[str, str] | None, if_none_exist: str | None) -> str:
    """Return a call without the values of its parameters, such as ``PUT Patient?identifier=…``."""
    parameters = "&".join(f"{name}=…" for name in query or ())
    condition = " (If-None-Exist: identifier=…)" if if_none_exist is not None else ""
    return f"{method} {path}{'?' if parameters else ''}{parameters}{condition}"


def _code(error: urllib3.exceptions.HTTPError) -> str:
    if isinstance(error, urllib3.exceptions.NewConnectionError | urllib3.exceptions.NameResolutionError):
        return "unreachable"
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return "timeout"
    if isinstance(error, urllib3.exceptions.SSLError):
        return "tls"
    return "broken-off"
