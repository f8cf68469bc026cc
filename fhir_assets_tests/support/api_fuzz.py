"""Requests that schemathesis generates from the OpenAPI document, and its checks of the responses."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import cycle
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fhir_assets.api.access import PUBLIC_PATHS, ROUTE_ROLES
from fhir_assets_tests.support.api import ROLES, Api, role_secret

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def fuzz(
    api: Api,
    *,
    examples: int,
    known: Mapping[str, str],
    unavailable: frozenset[str] = frozenset(),
) -> dict[str, set[int]]:
    """Send ``examples`` valid and ``examples`` invalid requests to every operation. Return the statuses by operation.

    ``known`` are values of path parameters by name; operations with these parameters also get ``examples`` requests
    with these values. The roles that may call an operation take turns. Each of the others sends the last request of
    each kind, too, and must be refused. Fails if a response is not documented or has a status of 500 or above;
    operations in ``unavailable`` may answer 503.
    """
    document = schemathesis.openapi.from_dict(api.get("/openapi.json").json())
    seen: dict[str, set[int]] = {}
    for result in document.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        statuses = seen.setdefault(operation.label, set())

        checks = _RoleChecks(api, operation.label, statuses, unavailable)
        strategies = [operation.as_strategy(GenerationMode.POSITIVE)]
        parameters = [parameter.name for parameter in operation.path_parameters if parameter.name in known]
        if known_values := {name: known[name] for name in parameters}:
            strategies.append(operation.as_strategy(GenerationMode.POSITIVE, path_parameters=known_values))
        for strategy in strategies:
            _deterministic(given(case=strategy)(checks.check_allowed), examples)()
            checks.check_denied()
        # An operation without parameters and body has no invalid requests.
        with suppress(Unsatisfiable):
            _deterministic(given(case=operation.as_strategy(GenerationMode.NEGATIVE))(checks.check_allowed), examples)()
            checks.check_denied()
    return seen


def _deterministic(test: Callable[[], None], examples: int) -> Callable[[], None]:
    """Configure a test so that every run uses the same examples."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(test)


class _RoleChecks:
    """Sends the requests of one operation with the tokens of all roles, and checks the responses."""

    def __init__(self, api: Api, label: str, statuses: set[int], unavailable: frozenset[str]) -> None:
        self._api = api
        self._label = label
        self._statuses = statuses
        self._unavailable = unavailable
        method, _, path = label.partition(" ")
        allowed = set(ROLES) if path in PUBLIC_PATHS else {str(role) for role in ROUTE_ROLES[method, path]}
        self._allowed = cycle(role for role in ROLES if role in allowed)
        self._denied = [role for role in ROLES if role not in allowed]
        self._last: Case[Any] | None = None

    def check_allowed(self, case: Case[Any]) -> None:
        """Send a request with the next role that may send it."""
        if isinstance(case.query, dict) and "wait" in case.query:
            case.query["wait"] = 0
        self._last = case
        response = self._call(case, next(self._allowed))
        self._statuses.add(response.status_code)
        assert response.status_code < 500 or (response.status_code == 503 and self._label in self._unavailable), (
            f"{self._label} answered {response.status_code}: {response.text}"
        )
        case.validate_response(response, checks=CHECKS)

    def check_denied(self) -> None:
        """Send the last request with each role that may not send it."""
        assert self._last is not None
        for role in self._denied:
            response = self._call(self._last, role)
            # An invalid request may have an Authorization of its own.
            assert response.status_code in (401, 403), f"{self._label} answered {role} with {response.status_code}"
            self._last.validate_response(response, checks=CHECKS)

    def _call(self, case: Case[Any], role: str) -> Response:
        headers = {"Authorization": f"Bearer {role_secret(role)}"}
        return case.call(base_url=self._api.url, headers=headers, timeout=120)
