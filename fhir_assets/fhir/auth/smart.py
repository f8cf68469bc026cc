"""SMART Backend Services: a token for what a client signs, or for its secret
(https://hl7.org/fhir/smart-app-launch/backend-services.html).
"""

import time
from collections.abc import Callable
from threading import Lock
from typing import Any
from uuid import uuid4

import orjson
import requests
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey, import_key
from requests import PreparedRequest

from fhir_assets.errors import ConfigurationError, NotFhir, ServerRefused, ServerUnavailable
from fhir_assets.fhir.auth.credentials import Credentials

_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_ASSERTION_SECONDS = 240
_EARLY = 0.2
"""A token is renewed when this share of its life is left, at most _EARLY_SECONDS."""
_EARLY_SECONDS = 60.0
_TIMEOUT = 30

Key = RSAKey | ECKey


def parse_private_key(text: str, key_id: str | None = None) -> Key:
    """A private key from PEM or a JWK: RSA signs with RS384, an elliptic curve (P-384) with ES384.

    Raises ConfigurationError, without the key.
    """
    content = text.strip()
    try:
        parameters: Any = {"kid": key_id} if key_id else None
        if content.startswith("{"):
            key = import_key(orjson.loads(content), parameters=parameters)
        elif "RSA" in content.partition("\n")[0]:
            key = RSAKey.import_key(content, parameters)
        else:
            key = _of_pem(content, parameters)
    except (ValueError, JoseError):
        raise ConfigurationError(
            "FHIR_AUTH_PRIVATE_KEY is neither a private key in PEM nor a JWK: give one of RSA or of the curve P-384"
        ) from None
    if not isinstance(key, RSAKey | ECKey) or not key.is_private:
        raise ConfigurationError("FHIR_AUTH_PRIVATE_KEY is no private key of RSA or of an elliptic curve")
    if isinstance(key, ECKey) and key.curve_name != "P-384":
        raise ConfigurationError(f"FHIR_AUTH_PRIVATE_KEY is of the curve {key.curve_name}; ES384 needs P-384")
    return key


def _of_pem(content: str, parameters: Any) -> Key:
    try:
        return RSAKey.import_key(content, parameters)
    except (ValueError, JoseError):
        return ECKey.import_key(content, parameters)


class BackendServices(Credentials):
    """Tokens of a client that signs with a private ``key``, or that has a ``secret``. A token is kept until shortly
    before its end, shared by all threads, and a new one is got in the middle of whatever goes on.

    ``token_url``: unset, it is discovered at the FHIR server.
    """

    remedy = (
        "it refuses the token: check FHIR_AUTH_CLIENT_ID, its key or secret and FHIR_AUTH_SCOPE, and that the "
        "client is registered there"
    )

    def __init__(
        self,
        base_url: str,
        client_id: str,
        *,
        key: Key | None = None,
        secret: str | None = None,
        token_url: str | None = None,
        scope: str = "system/*.read",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._client_id = client_id
        self._key = key
        self._secret = secret
        self._token_url = token_url
        self._scope = scope
        self._clock = clock
        self._token: str | None = None
        self._renew_at = 0.0
        self._lock = Lock()

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Sign a request with a token that is good still. Raises ServerUnavailable, ServerRefused."""
        with self._lock:
            if self._token is None or self._clock() >= self._renew_at:
                self._get_token()
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def renew(self) -> bool:
        """Forget the token that was refused."""
        with self._lock:
            self._token = None
        return True

    def _get_token(self) -> None:
        url = self._token_url = self._token_url or self._discovered()
        form = {"grant_type": "client_credentials", "scope": self._scope}
        auth: Credentials | tuple[str, str] = Credentials()
        if self._key is not None:
            form |= {"client_assertion_type": _ASSERTION, "client_assertion": self._assertion(url, self._key)}
        else:
            auth = (self._client_id, self._secret or "")
        answer = _call("POST", url, data=form, auth=auth)
        if answer.status_code in (400, 401, 403):
            raise ServerRefused(f"the token endpoint of {self._base_url} answered {answer.status_code}: {self.remedy}")
        found = _document(answer, "token endpoint", self._base_url)
        token, lifetime = found.get("access_token"), found.get("expires_in", 300)
        if not isinstance(token, str) or not isinstance(lifetime, int | float):
            raise NotFhir(f"the token endpoint of {self._base_url} gives no token: is FHIR_AUTH_TOKEN_URL right?")
        self._token = token
        self._renew_at = self._clock() + lifetime - min(lifetime * _EARLY, _EARLY_SECONDS)

    def _assertion(self, audience: str, key: Key) -> str:
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

    def _discovered(self) -> str:
        answer = _call("GET", f"{self._base_url}/.well-known/smart-configuration", auth=Credentials())
        url = _document(answer, "SMART configuration", self._base_url).get("token_endpoint")
        if not isinstance(url, str):
            raise NotFhir(f"{self._base_url} names no token endpoint: set FHIR_AUTH_TOKEN_URL")
        return url


def _call(method: str, url: str, **options: Any) -> requests.Response:
    for attempt in range(4):
        if attempt:
            time.sleep(0.5 * 2**attempt)
        try:
            answer = requests.request(method, url, timeout=_TIMEOUT, headers={"Accept": "application/json"}, **options)
        except requests.RequestException:
            continue
        if answer.status_code < 500 and answer.status_code != 429:
            return answer
    raise ServerUnavailable("the server that gives the tokens does not answer: is it up, is FHIR_AUTH_TOKEN_URL right?")


def _document(answer: requests.Response, what: str, base_url: str) -> dict[str, Any]:
    try:
        found = answer.json() if answer.ok else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise NotFhir(f"{base_url}: no {what} there ({answer.status_code}): set FHIR_AUTH_TOKEN_URL, or FHIR_BASE_URL")
    return found
