"""Authentication and authorization: tokens, roles, request rates, and the roles that each route requires.

An entry of API_TOKENS is ``name:role:sha256``, with the SHA-256 of the token's secret; the secret itself is
not stored. A request without a known token gets 401 before its body is read; a request whose token does not have a role
that the route requires gets 403.
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

_is_name = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}").fullmatch
_is_digest = re.compile(r"[0-9a-fA-F]{64}").fullmatch


class Role(StrEnum):
    """The role of a token. ``ROUTE_ROLES`` lists the roles that may call each route; ``admin`` may call all."""

    READER = "reader"
    REGISTRAR = "registrar"
    OPERATOR = "operator"
    INGESTER = "ingester"
    AUDITOR = "auditor"
    ADMIN = "admin"


_READ = frozenset({Role.READER, Role.REGISTRAR, Role.ADMIN})
_OPERATE = frozenset({Role.OPERATOR, Role.ADMIN})
_INTAKE = frozenset({Role.INGESTER, Role.ADMIN})
_AUDIT = frozenset({Role.AUDITOR, Role.ADMIN})
_ALL = frozenset(Role)

SSN_ROLES = frozenset({Role.REGISTRAR, Role.ADMIN})
"""The roles that may search patients by social security number."""

ROUTE_ROLES: Mapping[tuple[str, str], frozenset[Role]] = {
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
    ("GET", "/audit"): _AUDIT,
    ("GET", "/metrics"): _OPERATE,
    ("GET", "/docs"): _ALL,
    ("GET", "/docs/files/{name}"): _ALL,
    ("GET", "/redoc"): _ALL,
    ("GET", "/openapi.json"): _ALL,
}
"""The roles that may call each route. The application does not start with a route that is missing here."""

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
"""The paths that need no token."""

DOCS_PATHS = frozenset({"/docs", "/redoc"})
"""The pages that show the OpenAPI document. A browser asks for the token: the password of Basic authentication."""


def is_read_by_browsers(path: str) -> bool:
    """Return whether a path is one of ``DOCS_PATHS`` or of what they load, for which a browser sends the token."""
    return path in DOCS_PATHS or path == "/openapi.json" or path.startswith("/docs/files/")


@dataclass(frozen=True, slots=True)
class Token:
    """One entry of API_TOKENS."""

    name: str
    role: Role
    sha256: bytes = field(repr=False)

    @property
    def actor(self) -> str:
        """The token's name in the audit log."""
        return f"api:{self.name}"


def parse_tokens(text: str) -> tuple[Token, ...]:
    """Parse API_TOKENS, entries ``name:role:sha256`` separated by commas.

    Raises ConfigurationError if an entry is malformed, or if two entries share a name or a secret. The message names an
    entry by its position only.
    """
    tokens = []
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    for position, entry in enumerate(entries, start=1):
        name, _, rest = entry.partition(":")
        role, _, digest = rest.partition(":")
        if not _is_name(name) or role not in {known.value for known in Role} or not _is_digest(digest):
            raise ConfigurationError(
                f"token {position} of API_TOKENS is malformed: an entry is name:role:sha256, with one of the roles "
                f"{', '.join(Role)}; `fhir-assets api token NAME ROLE` creates one"
            )
        tokens.append(Token(name, Role(role), bytes.fromhex(digest)))
    if len({token.name for token in tokens}) < len(tokens) or len({token.sha256 for token in tokens}) < len(tokens):
        raise ConfigurationError(
            "two entries of API_TOKENS have the same name or the same secret: give each entry its own"
        )
    return tuple(tokens)


def create_token(name: str, role: Role) -> tuple[str, str]:
    """Return a new random secret and its entry for API_TOKENS. Raises ConfigurationError if the name is not valid."""
    if not _is_name(name):
        raise ConfigurationError(
            "a token's name has 1 to 64 characters, each one of A-Z, a-z, 0-9, . _ @ -, and begins with a character of "
            "A-Z, a-z, 0-9: give, for example, the name of a service"
        )
    secret = secrets.token_urlsafe(32)
    return secret, f"{name}:{role.value}:{hashlib.sha256(secret.encode()).hexdigest()}"


class Authenticator:
    """Finds the token that an Authorization header presents."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tuple(tokens)

    def authenticate(self, authorization: str) -> Token | None:
        """Return the token of an Authorization header, or None if the header presents no known token.

        The secret is the credential of the Bearer scheme, or the password of the Basic scheme, which browsers use.
        """
        secret = _read_secret(authorization)
        if secret is None:
            return None
        digest = hashlib.sha256(secret).digest()
        authenticated = None
        for token in self._tokens:
            # The loop compares all tokens, so that its duration does not depend on which token matches.
            if hmac.compare_digest(token.sha256, digest):
                authenticated = token
        return authenticated


class RateLimiter:
    """A token bucket for each API token."""

    def __init__(
        self, tokens: Sequence[Token], *, rate: float, burst: float | None = None, now: Callable[[], float] = monotonic
    ) -> None:
        """Allow each token ``rate`` requests a second, and ``burst`` requests at a time (default: 2 * ``rate``)."""
        self._rate = rate
        self._burst = max(1.0, 2 * rate if burst is None else burst)
        self._now = now
        self._buckets = {token.name: (self._burst, now()) for token in tokens}

    def take(self, token: Token) -> float:
        """Return 0 and count the request if the token may send one now, else return the seconds to wait."""
        available, since = self._buckets[token.name]
        now = self._now()
        available = min(self._burst, available + (now - since) * self._rate)
        allowed = available >= 1
        self._buckets[token.name] = (available - 1 if allowed else available, now)
        return 0.0 if allowed else (1 - available) / self._rate


def _read_secret(authorization: str) -> bytes | None:
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
