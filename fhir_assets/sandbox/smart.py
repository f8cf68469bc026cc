"""SMART Backend Services for the sandbox: discovery, a token endpoint, and tokens that expire.

See https://hl7.org/fhir/smart-app-launch/backend-services.html.
"""

import base64
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import orjson
from fastapi import APIRouter, Request, Response
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import import_key

ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
TOKEN_PATH = "/_sandbox/token"
_ALGORITHMS = ["RS384", "ES384"]


@dataclass(slots=True)
class Smart:
    """The registered clients and the issued tokens.

    ``clients`` maps a client id to a public JWK or a secret. ``lifetime`` is the lifetime of a token in seconds;
    ``issued`` is the number of issued tokens.
    """

    clients: Mapping[str, Mapping[str, Any] | str]
    lifetime: float = 300
    issued: int = 0
    scopes: set[str] = field(default_factory=set)
    """The scopes that clients requested."""
    _tokens: dict[str, float] = field(default_factory=dict)
    _used_assertions: set[str] = field(default_factory=set)

    def admits(self, header: str) -> bool:
        """Return whether an Authorization header contains a valid token."""
        return self._tokens.get(header.removeprefix("Bearer "), 0.0) > time.monotonic()

    def issue(self, scope: str) -> dict[str, object]:
        """Issue a new token."""
        token = secrets.token_urlsafe(24)
        self._tokens[token] = time.monotonic() + self.lifetime
        self.issued += 1
        self.scopes.add(scope)
        return {"access_token": token, "token_type": "bearer", "expires_in": self.lifetime, "scope": scope}

    def verify(self, form: Mapping[str, str], basic: str, audience: str) -> bool:
        """Return whether a token request comes from a registered client."""
        if form.get("grant_type") != "client_credentials":
            return False
        if form.get("client_assertion_type") == ASSERTION:
            return self._verify_assertion(form.get("client_assertion", ""), audience)
        client, _, secret = base64.b64decode(basic.removeprefix("Basic ") or b"").decode().partition(":")
        return bool(secret) and self.clients.get(client) == secret

    def _verify_assertion(self, assertion: str, audience: str) -> bool:
        try:
            payload = orjson.loads(base64.urlsafe_b64decode(assertion.split(".")[1] + "=="))
            key = self.clients.get(payload["iss"])
            if not isinstance(key, Mapping):
                return False
            claims = jwt.decode(assertion, import_key(dict(key)), algorithms=_ALGORITHMS).claims
        except (JoseError, ValueError, LookupError):
            return False
        is_fresh = time.time() < claims["exp"] <= time.time() + 300 and claims["jti"] not in self._used_assertions
        self._used_assertions.add(claims["jti"])
        return is_fresh and claims["aud"] == audience and claims["sub"] == claims["iss"]


def build_smart_routes(smart: Smart, base: str) -> APIRouter:
    """Return the routes of discovery and the token endpoint."""
    routes = APIRouter()

    @routes.get(f"{base}/.well-known/smart-configuration")
    async def configuration(request: Request) -> Response:
        document = {
            "token_endpoint": _token_url(request),
            "token_endpoint_auth_methods_supported": ["private_key_jwt", "client_secret_basic"],
            "token_endpoint_auth_signing_alg_values_supported": _ALGORITHMS,
            "scopes_supported": ["system/*.read", "system/*.write"],
        }
        return Response(orjson.dumps(document), media_type="application/json")

    @routes.post(TOKEN_PATH)
    async def token(request: Request) -> Response:
        form = dict(parse_qsl((await request.body()).decode()))
        if not smart.verify(form, request.headers.get("authorization", ""), _token_url(request)):
            return Response(orjson.dumps({"error": "invalid_client"}), 401, media_type="application/json")
        return Response(orjson.dumps(smart.issue(form.get("scope", ""))), media_type="application/json")

    return routes


def _token_url(request: Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc}{TOKEN_PATH}"
