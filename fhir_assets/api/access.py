"""Who may do what: tokens, roles, and the one table of the routes.

A token is ``name:role:sha256 of the secret`` in API_TOKENS; the secret itself is nowhere kept. Whoever presents none
that fits gets 401 before anything else is looked at; whoever may not, 403.
"""

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from time import monotonic

from fhir_assets.errors import ConfigurationError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}").fullmatch
_DIGEST = re.compile(r"[0-9a-fA-F]{64}").fullmatch


class Role(StrEnum):
    """What a token is for. ``admin`` may do everything."""

    READER = "reader"
    OPERATOR = "operator"
    INGESTER = "ingester"
    ADMIN = "admin"


_READ = frozenset({Role.READER, Role.ADMIN})
_OPERATE = frozenset({Role.OPERATOR, Role.ADMIN})
_INTAKE = frozenset({Role.INGESTER, Role.ADMIN})
_ALL = frozenset(Role)

ACCESS: Mapping[tuple[str, str], frozenset[Role]] = {
    ("POST", "/ingest"): _INTAKE,
    ("GET", "/ingest/tasks/{task_id}"): _INTAKE | _OPERATE,
    ("POST", "/api/v1/ingest"): _INTAKE,
    ("POST", "/fhir"): _INTAKE,
    ("GET", "/patients"): _READ,
    ("GET", "/patients/{patient_id}"): _READ,
    ("GET", "/api/v1/patients/{patient_id}"): _READ,
    ("POST", "/ingest/{resource_type}"): _OPERATE,
    ("POST", "/ingest/{resource_type}/backfill"): _OPERATE,
    ("GET", "/runs"): _OPERATE,
    ("GET", "/runs/{run_id}"): _OPERATE,
    ("GET", "/runs/{run_id}/deadletters"): _OPERATE,
    ("POST", "/runs/{run_id}/replay"): _OPERATE,
    ("POST", "/export/{resource_type}"): _OPERATE,
    ("GET", "/metrics"): _OPERATE,
    ("GET", "/docs"): _ALL,
    ("GET", "/openapi.json"): _ALL,
}
"""Who may call which route. A route that is not here is served to nobody: the application does not start with it."""

OPEN = frozenset({"/health", "/health/live", "/health/ready"})
"""The paths that need no token."""


@dataclass(frozen=True, slots=True)
class Token:
    """One of API_TOKENS."""

    name: str
    role: Role
    sha256: bytes = field(repr=False)

    @property
    def actor(self) -> str:
        """As the audit log names it."""
        return f"api:{self.name}"


def parse_tokens(text: str) -> tuple[Token, ...]:
    """The tokens of API_TOKENS. Raises ConfigurationError, which names a token by its place only."""
    found = []
    for place, part in enumerate((each.strip() for each in text.split(",") if each.strip()), start=1):
        name, _, rest = part.partition(":")
        role, _, digest = rest.partition(":")
        if not _NAME(name) or role not in {each.value for each in Role} or not _DIGEST(digest):
            raise ConfigurationError(
                f"token {place} of API_TOKENS is malformed: it is name:role:sha256, the role one of "
                f"{', '.join(Role)}; `fhir-assets api token NAME ROLE` makes one"
            )
        found.append(Token(name, Role(role), bytes.fromhex(digest)))
    if len({token.name for token in found}) < len(found) or len({token.sha256 for token in found}) < len(found):
        raise ConfigurationError("API_TOKENS holds two tokens of one name or one secret: each needs its own")
    return tuple(found)


def new_token(name: str, role: Role) -> tuple[str, str]:
    """A fresh secret, and the entry of API_TOKENS for it. Raises ConfigurationError for an unusable name."""
    if not _NAME(name):
        raise ConfigurationError("a token's name is 1 to 64 letters, digits and . _ @ -, such as a service's name")
    secret = secrets.token_urlsafe(32)
    return secret, f"{name}:{role.value}:{hashlib.sha256(secret.encode()).hexdigest()}"


class Gatekeeper:
    """Knows the tokens, and how fast each has been calling."""

    def __init__(
        self, tokens: Sequence[Token], *, rate: float, burst: float | None = None, now: Callable[[], float] = monotonic
    ) -> None:
        """``rate``: requests a second of one token; ``burst``: how many may come at once; unset: those of 2 s."""
        self._tokens = tuple(tokens)
        self._rate = rate
        self._burst = max(1.0, 2 * rate if burst is None else burst)
        self._now = now
        self._left = {token.name: (self._burst, now()) for token in tokens}

    def recognize(self, authorization: str) -> Token | None:
        """The token that an Authorization header presents: as Bearer, or as the password of Basic, for browsers."""
        secret = _secret(authorization)
        if secret is None:
            return None
        digest = hashlib.sha256(secret).digest()
        found = None
        for token in self._tokens:
            # All are compared, so that the time does not tell which came close.
            if hmac.compare_digest(token.sha256, digest):
                found = token
        return found

    def wait(self, token: Token) -> float:
        """0 if the token may call now, else the seconds until it may."""
        left, since = self._left[token.name]
        now = self._now()
        left = min(self._burst, left + (now - since) * self._rate)
        allowed = left >= 1
        self._left[token.name] = (left - 1 if allowed else left, now)
        return 0.0 if allowed else (1 - left) / self._rate


def _secret(authorization: str) -> bytes | None:
    scheme, _, value = authorization.strip().partition(" ")
    value = value.strip()
    if not value:
        return None
    if scheme.lower() == "bearer":
        return value.encode("utf-8", "surrogateescape")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None
