"""Authentication, roles and request rates. The tests cover all routes of the application."""

import re

import pytest

from fhir_assets.api import app as application
from fhir_assets.api.access import (
    PUBLIC_PATHS,
    ROUTE_ROLES,
    Authenticator,
    RateLimiter,
    Role,
    create_token,
    parse_tokens,
)
from fhir_assets.api.app import create_app, list_routes
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import load_settings
from fhir_assets_tests.support.api import ROLES, TOKENS, Api, Serve

PROBLEM = "application/problem+json"


def test_every_route_refuses_no_token_a_wrong_token_and_a_wrong_role(api: Api) -> None:
    routes = list_routes(create_app(api.settings))
    refused_roles = 0
    for route in routes:
        path = re.sub(r"\{[^}]+\}", "x", route.path)
        for method in route.methods or ():
            if route.path in PUBLIC_PATHS:
                continue
            allowed = ROUTE_ROLES[method, route.path]
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic d3Jvbmc6d3Jvbmc="}):
                answer = api.call(method, path, role=None, headers=headers, data=b"{")
                assert (answer.status_code, answer.headers["Content-Type"]) == (401, PROBLEM), (method, path)
                assert "WWW-Authenticate" in answer.headers
            for role in ROLES:
                if Role(role) not in allowed:
                    answer = api.call(method, path, role=role, data=b"{")
                    assert (answer.status_code, answer.headers["Content-Type"]) == (403, PROBLEM), (method, path, role)
                    refused_roles += 1
    assert refused_roles > len(ROUTE_ROLES)
    assert api.get("/nowhere", role=None).status_code == 401
    assert api.get("/nowhere").status_code == 404


def test_the_role_table_lists_exactly_the_existing_routes_and_admin_may_call_all() -> None:
    app = create_app(load_settings(api_tokens=TOKENS))
    existing = {(method, route.path) for route in list_routes(app) for method in route.methods or ()}
    assert set(ROUTE_ROLES) == {route for route in existing if route[1] not in PUBLIC_PATHS}
    assert all(Role.ADMIN in allowed for allowed in ROUTE_ROLES.values())


def test_the_application_does_not_start_with_a_route_without_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "ROUTE_ROLES", {k: v for k, v in ROUTE_ROLES.items() if k[1] != "/patients"})
    with pytest.raises(AssertionError, match="GET /patients"):
        create_app(load_settings(api_tokens=TOKENS))


def test_docs_can_be_switched_off_and_need_a_token_where_they_are_served() -> None:
    served = create_app(load_settings(api_tokens=TOKENS))
    bare = create_app(load_settings(api_tokens=TOKENS, api_docs=False))
    removed = {r.path for r in list_routes(served)} - {r.path for r in list_routes(bare)}
    assert removed == {"/docs", "/redoc", "/docs/files/{name}", "/openapi.json"}


def test_a_token_is_kept_as_its_hash_only() -> None:
    secret, entry = create_token("lab", Role.INGESTER)
    assert secret not in entry
    (token,) = parse_tokens(entry)
    authenticator = Authenticator([token])
    assert authenticator.authenticate(f"Bearer {secret}") == token
    assert authenticator.authenticate(f"bearer {secret}x") is None
    assert authenticator.authenticate(secret) is None


@pytest.mark.parametrize("text", ["lab", "lab:boss:" + "0" * 64, "lab:reader:xyz", "a b:reader:" + "0" * 64])
def test_an_error_names_a_malformed_token_by_its_position_only(text: str) -> None:
    with pytest.raises(ConfigurationError, match="token 1 of API_TOKENS") as raised:
        parse_tokens(text)
    assert "0000" not in str(raised.value)


def test_a_token_that_calls_too_often_waits_and_another_does_not() -> None:
    now = 0.0
    one, other = parse_tokens(f"one:reader:{'0' * 64},other:reader:{'1' * 64}")
    limiter = RateLimiter([one, other], rate=10, burst=2, now=lambda: now)
    assert [limiter.take(one) for _ in range(2)] == [0.0, 0.0]
    assert limiter.take(one) == pytest.approx(0.1)
    assert limiter.take(other) == 0.0
    now = 0.1
    assert limiter.take(one) == 0.0


def test_too_many_calls_are_answered_429_with_the_time_to_wait(serve: Serve) -> None:
    api = serve(api_rate_limit=0.5)
    answers = [api.get("/runs") for _ in range(3)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert int(refused[0].headers["Retry-After"]) >= 1


def test_every_response_has_the_security_headers_and_a_request_id(api: Api) -> None:
    for answer in (api.get("/runs"), api.get("/runs", role=None), api.get("/health/live")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert "server" not in answer.headers
    assert api.get("/runs", headers={"X-Request-ID": "mine-1"}).headers["X-Request-ID"] == "mine-1"
