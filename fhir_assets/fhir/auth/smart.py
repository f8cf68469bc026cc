"""SMART Backend Services: access tokens for a client that authenticates by a signed assertion or a secret
(https://hl7.org/fhir/smart-app-launch/backend-services.html).
"""

import time
from collections.abc import Callable
from threading import Lock
from typing import Any
from urllib.parse import urljoin
from uuid import uuid4

import orjson
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey, import_key
from requests import PreparedRequest, RequestException
from urllib3.exceptions import HTTPError

from fhir_assets.errors import ConfigurationError, NotFhir, ServerRefused
from fhir_assets.fhir.auth.credentials import Credentials, is_valid_token
from fhir_assets.fhir.labels import DEFAULT_LABELS, ServerLabels
from fhir_assets.fhir.transport.addresses import are_public, resolve
from fhir_assets.fhir.transport.limits import ANSWER_TIMEOUTS, AnswerLimits
from fhir_assets.fhir.transport.origin import Origin, is_confidential, parse_origin
from fhir_assets.fhir.transport.session import Answer, Session
from fhir_assets.retries import Retrier, RetryPolicy, TransientFailure, read_retry_after

TOKEN_POLICY = RetryPolicy(attempts=4, first_wait=1, max_wait=4, max_retry_after=60, budget=240)
"""Retries of a request for a token. Other threads wait for the token meanwhile, so the policy is short."""

_ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_ASSERTION_SECONDS = 240
_DEFAULT_LIFETIME = 300
_RENEWAL_SHARE = 0.2
"""A token is renewed when this share of its lifetime, or ``_RENEWAL_SECONDS`` if that is shorter, remains."""
_RENEWAL_SECONDS = 60.0
_TIMEOUT_SECONDS = 30
_MAX_REDIRECTS = 5
_REDIRECT_STATUS = frozenset({301, 302, 303, 307, 308})

Key = RSAKey | ECKey


def parse_private_key(text: str, key_id: str | None = None, *, labels: ServerLabels = DEFAULT_LABELS) -> Key:
    """Parse a private key from PEM or a JWK. An RSA key signs with RS384, an elliptic-curve key (P-384) with ES384.

    ``key_id`` is the ``kid`` of a key whose JWK has none. Raises ConfigurationError; no message contains the key.
    """
    content = text.strip()
    try:
        parameters: Any = {"kid": key_id} if key_id else None
        if content.startswith("{"):
            key = import_key(orjson.loads(content), parameters=parameters)
        elif "RSA" in content.partition("\n")[0]:
            key = RSAKey.import_key(content, parameters)
        else:
            key = _parse_pem(content, parameters)
    except (ValueError, JoseError):
        raise ConfigurationError(
            f"{labels.private_key} is neither a private key in PEM nor a JWK: set an RSA key or a key of the curve "
            "P-384"
        ) from None
    if not isinstance(key, RSAKey | ECKey) or not key.is_private:
        raise ConfigurationError(f"{labels.private_key} is not a private key of RSA or of an elliptic curve")
    if isinstance(key, ECKey) and key.curve_name != "P-384":
        raise ConfigurationError(f"{labels.private_key} uses the curve {key.curve_name}; ES384 needs P-384")
    return key


def _parse_pem(content: str, parameters: Any) -> Key:
    try:
        return RSAKey.import_key(content, parameters)
    except (ValueError, JoseError):
        return ECKey.import_key(content, parameters)


class BackendServices(Credentials):
    """Access tokens for a client that signs with a private ``key`` or has a ``secret``.

    All threads share one token, which is renewed shortly before it expires. If ``token_url`` is None, the token
    endpoint is read from the FHIR server's SMART configuration. What proves the client's identity is sent to this
    endpoint only, over TLS or to this machine, and never along a redirect.
    """

    is_token = True

    def __init__(
        self,
        base_url: str,
        client_id: str,
        *,
        key: Key | None = None,
        secret: str | None = None,
        token_url: str | None = None,
        scope: str = "system/*.read",
        labels: ServerLabels = DEFAULT_LABELS,
        limits: AnswerLimits | None = None,
        retrier: Retrier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(labels=labels)
        self._base_url = base_url.rstrip("/")
        self._client_id = client_id
        self._key = key
        self._secret = secret
        self._token_url = token_url
        self._scope = scope
        self._limits = limits or AnswerLimits(ANSWER_TIMEOUTS * _TIMEOUT_SECONDS)
        self._retrier = retrier or Retrier(TOKEN_POLICY)
        self._clock = clock
        self._token: str | None = None
        self._renew_at = 0.0
        self._lock = Lock()

    @property
    def remedy(self) -> str:
        """The advice after status 401."""
        return (
            f"it refuses the token: check {self.labels.client_id}, its key or secret and {self.labels.scope}, and that "
            "the client is registered there"
        )

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Sign a request with a valid token. Raises ServerUnavailable, ServerRefused or NotFhir."""
        with self._lock:
            if self._token is None or self._clock() >= self._renew_at:
                self._request_token()
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def renew(self) -> bool:
        """Discard the token, which the server refused; the next request gets another one."""
        with self._lock:
            self._token = None
        return True

    def _request_token(self) -> None:
        self._require_tls(self._base_url, self.labels.base_url)
        url = self._token_url = self._token_url or self._discover_token_url()
        self._require_tls(url, self.labels.token_url)
        form = {"grant_type": "client_credentials", "scope": self._scope}
        auth: Credentials | tuple[str, str] = Credentials()
        if self._key is not None:
            form |= {"client_assertion_type": _ASSERTION_TYPE, "client_assertion": self._sign_assertion(url, self._key)}
        else:
            auth = (self._client_id, self._secret or "")
        response = self._call("POST", url, "token endpoint", data=form, auth=auth)
        if response.status in (400, 401, 403):
            raise ServerRefused(f"the token endpoint of {self._base_url} answered {response.status}: {self.remedy}")
        document = self._read_object(response, "token endpoint")
        token, lifetime = document.get("access_token"), document.get("expires_in", _DEFAULT_LIFETIME)
        if not isinstance(token, str) or not is_valid_token(token) or not isinstance(lifetime, int | float):
            raise NotFhir(f"the token endpoint of {self._base_url} returns no token: is {self.labels.token_url} right?")
        self._token = token
        self._renew_at = self._clock() + lifetime - min(lifetime * _RENEWAL_SHARE, _RENEWAL_SECONDS)

    def _require_tls(self, url: str, name: str) -> None:
        """Raise ConfigurationError if others could read what is sent to ``url``, or if it is not a URL."""
        try:
            is_safe = is_confidential(parse_origin(url))
        except ValueError:
            is_safe = False
        if not is_safe:
            raise ConfigurationError(
                f"{self._base_url}: tokens are requested and sent over TLS only, so that nobody on the way can use "
                f"them: set {name} to an address that begins with https://"
            )

    def _sign_assertion(self, audience: str, key: Key) -> str:
        now = int(time.time())
        algorithm = "RS384" if isinstance(key, RSAKey) else "ES384"
        header = {"alg": algorithm, "typ": "JWT", **({"kid": key.kid} if key.kid else {})}
        claims = {
            "iss": self._client_id,
            "sub": self._client_id,
            "aud": audience,
            "exp": now + _ASSERTION_SECONDS,
            "iat": now,
            "jti": str(uuid4()),
        }
        return jwt.encode(header, claims, key, algorithms=[algorithm])

    def _discover_token_url(self) -> str:
        """Return the token endpoint that the server names. Raises NotFhir, ConfigurationError or ServerUnavailable."""
        url = f"{self._base_url}/.well-known/smart-configuration"
        origin = parse_origin(url)
        for _ in range(_MAX_REDIRECTS):
            response = self._call("GET", url, "SMART configuration", auth=Credentials())
            if response.status not in _REDIRECT_STATUS:
                break
            url = self._follow(url, response, origin)
        token_url = self._read_object(response, "SMART configuration").get("token_endpoint")
        if not isinstance(token_url, str) or not self._may_name(token_url):
            raise NotFhir(f"{self._base_url} names no token endpoint: set {self.labels.token_url}")
        return token_url

    def _follow(self, url: str, response: Answer, origin: Origin) -> str:
        """Return the target of a redirect. Another server may not name the token endpoint: raises NotFhir."""
        try:
            target = urljoin(url, response.headers.get("Location", ""))
            if parse_origin(target) == origin:
                return target
        except ValueError:
            pass
        raise NotFhir(
            f"{self._base_url} redirects requests for its SMART configuration to another server, which is not asked: "
            f"set {self.labels.token_url}, or correct {self.labels.base_url}"
        )

    def _may_name(self, url: str) -> bool:
        """Return whether the server may name this token endpoint: one of a private network only if it is in one."""
        try:
            own, named = parse_origin(self._base_url)[1], parse_origin(url)[1]
        except ValueError:
            return False
        return own == named or are_public(resolve(named)) or not are_public(resolve(own))

    def _call(self, method: str, url: str, name: str, **options: Any) -> Answer:
        """Send a request and return its response. Status 429 and 5xx are retried. Raises ServerUnavailable."""
        advice = f"is the server that issues tokens up, and is {self.labels.token_url} right?"

        def attempt() -> Answer:
            try:
                with Session(self._limits) as session:
                    response = session.exchange(
                        method, url, timeout=_TIMEOUT_SECONDS, headers={"Accept": "application/json"}, **options
                    )
            except (RequestException, HTTPError):
                raise TransientFailure("no answer", advice=advice) from None
            if response.status >= 500 or response.status == 429:
                raise TransientFailure(
                    f"the server answered {response.status}",
                    advice=advice,
                    retry_after=read_retry_after(response.headers.get("Retry-After")),
                )
            return response

        return self._retrier.run(f"the {name} of {self._base_url}", attempt)

    def _read_object(self, response: Answer, name: str) -> dict[str, Any]:
        try:
            document = orjson.loads(response.body) if 200 <= response.status < 300 else None
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise NotFhir(
                f"{self._base_url}: no {name} there ({response.status}): set {self.labels.token_url}, or "
                f"{self.labels.base_url}"
            )
        return document
