"""Calls of the connector to the FHIR server: one attempt each, on kept connections, sorted into answers and failures.

urllib3 rather than requests: half the processor time a call, and a connector makes many small ones. Trying again is
the outbox's business, not this module's: a wait must not hold a worker.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import orjson
import urllib3
from requests import PreparedRequest
from requests.structures import CaseInsensitiveDict

from fhir_assets.errors import ConfigurationError, NotFhir, ServerRefused, TransientError
from fhir_assets.fhir.auth.credentials import Credentials
from fhir_assets.fhir.outcome import summarize_issues
from fhir_assets.metrics import connector as metrics
from fhir_assets.retries import read_retry_after

FHIR_JSON = "application/fhir+json"

_PASSING = frozenset({401, 403, 408, 409, 423, 425, 429})
_FOR_EVERYONE = frozenset({401, 403, 429, 503})
_NEVER = frozenset({501, 505})


class Passing(Exception):
    """A call failed in a way that another attempt may not. ``everyone``: it says nothing about this one patient."""

    def __init__(self, code: str, message: str, *, everyone: bool, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.everyone = everyone
        self.retry_after = retry_after


class Lasting(Exception):
    """A call failed, and would again: ``reason`` is a word to count by, the message a sentence without patient data."""

    def __init__(self, reason: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the server: its status, headers, and its body, parsed (None if empty)."""

    status: int
    headers: Mapping[str, str]
    body: object


class FhirServer:
    """The FHIR server behind ``base_url``; several threads may call. ``timeout`` in seconds bounds one call."""

    def __init__(self, base_url: str, credentials: Credentials, *, timeout: float, connections: int) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError("FHIR_BASE_URL must be an address that begins with http:// or https://")
        self.base_url = base_url.rstrip("/")
        self._credentials = credentials
        self._pool = urllib3.PoolManager(
            maxsize=connections, block=True, timeout=urllib3.Timeout(connect=min(10.0, timeout), read=timeout)
        )

    def close(self) -> None:
        """Let the connections go."""
        self._pool.clear()

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        absent: frozenset[int] = frozenset(),
    ) -> Reply:
        """One request. Statuses of ``absent`` are answers too. Raises Passing or Lasting."""
        url = f"{self.base_url}/{path}"
        if query:
            url += "?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
        started = time.perf_counter()
        try:
            response = self._send(method, url, body)
            if response.status == 401 and self._credentials.renew():
                response = self._send(method, url, body)
        except urllib3.exceptions.HTTPError as error:
            code = _code(error)
            metrics.CALL_ERRORS.labels(method=method, code=code).inc()
            raise Passing(code, f"the FHIR server cannot be reached ({code})", everyone=True) from None
        except (TransientError, ServerRefused, NotFhir) as error:
            metrics.CALL_ERRORS.labels(method=method, code="token").inc()
            raise Passing("token", f"no token: {error}", everyone=True) from None
        finally:
            metrics.CALL_LATENCY.labels(method=method).observe(time.perf_counter() - started)
        return self._judge(method, response, absent)

    def _send(self, method: str, url: str, body: bytes | None) -> urllib3.BaseHTTPResponse:
        request = PreparedRequest()
        request.headers = CaseInsensitiveDict({"Accept": FHIR_JSON, "User-Agent": "fhir-assets"})
        if body is not None:
            request.headers["Content-Type"] = FHIR_JSON
        self._credentials(request)
        return self._pool.request(method, url, body=body, headers=dict(request.headers), retries=False, redirect=False)

    def _judge(self, method: str, response: urllib3.BaseHTTPResponse, absent: frozenset[int]) -> Reply:
        status = response.status
        if status < 300 or status in absent:
            try:
                parsed = orjson.loads(response.data) if response.data else None
            except orjson.JSONDecodeError:
                if status >= 300:
                    return Reply(status, response.headers, None)
                metrics.CALL_ERRORS.labels(method=method, code="not-json").inc()
                raise Passing("not-json", "the answer is not whole JSON", everyone=False) from None
            return Reply(status, response.headers, parsed)
        metrics.CALL_ERRORS.labels(method=method, code=str(status)).inc()
        if status < 400:
            raise Passing(str(status), "the FHIR server redirects: correct FHIR_BASE_URL", everyone=True)
        if status in _PASSING or (status >= 500 and status not in _NEVER):
            raise Passing(
                str(status),
                f"the FHIR server answered {status}",
                everyone=status in _FOR_EVERYONE,
                retry_after=read_retry_after(response.headers.get("Retry-After")),
            )
        if status == 412:
            raise Lasting("several-matches", "the FHIR server has several resources with this identifier", status)
        found = ", ".join(summarize_issues(response.data))
        raise Lasting("refused", f"the FHIR server answered {status}{f': {found}' if found else ''}", status)


def _code(error: urllib3.exceptions.HTTPError) -> str:
    if isinstance(error, urllib3.exceptions.NewConnectionError | urllib3.exceptions.NameResolutionError):
        return "unreachable"
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return "timeout"
    if isinstance(error, urllib3.exceptions.SSLError):
        return "tls"
    return "broken-off"
