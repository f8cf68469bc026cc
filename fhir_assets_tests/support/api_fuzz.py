"""Requests that schemathesis generates from the OpenAPI document, and its checks of the responses."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fhir_assets_tests.support.api import Api, role_secret

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
    with these values. Fails if a response is not documented or has a status of 500 or above; operations in
    ``unavailable`` may answer 503.
    """
    document = schemathesis.openapi.from_dict(api.get("/openapi.json").json())
    seen: dict[str, set[int]] = {}
    for result in document.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        statuses = seen.setdefault(operation.label, set())

        check = _build_request_check(api, operation.label, statuses, unavailable)
        strategies = [operation.as_strategy(GenerationMode.POSITIVE)]
        parameters = [parameter.name for parameter in operation.path_parameters if parameter.name in known]
        if known_values := {name: known[name] for name in parameters}:
            strategies.append(operation.as_strategy(GenerationMode.POSITIVE, path_parameters=known_values))
        for strategy in strategies:
            _deterministic(given(case=strategy)(check), examples)()
        # An operation without parameters and body has no invalid requests.
        with suppress(Unsatisfiable):
            _deterministic(given(case=operation.as_strategy(GenerationMode.NEGATIVE))(check), examples)()
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


def _build_request_check(
    api: Api, label: str, statuses: set[int], unavailable: frozenset[str]
) -> Callable[[Case[Any]], None]:
    def check(case: Case[Any]) -> None:
        if isinstance(case.query, dict) and "wait" in case.query:
            case.query["wait"] = 0
        response = case.call(base_url=api.url, headers={"Authorization": f"Bearer {role_secret('admin')}"}, timeout=120)
        statuses.add(response.status_code)
        assert response.status_code < 500 or (response.status_code == 503 and label in unavailable), (
            f"{label} answered {response.status_code}: {response.text}"
        )
        case.validate_response(response, checks=CHECKS)

    return check
