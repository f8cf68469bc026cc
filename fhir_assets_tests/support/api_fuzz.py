"""Requests that schemathesis makes of the OpenAPI document, and what it holds against the answers."""

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
    """Ask every operation of the document ``examples`` times with what fits it, as often with what does not, and as
    often about what is there (``known``: values of path parameters by name). Returns the statuses by operation.

    Raises what schemathesis finds: an answer that is not documented, or a 5xx, but 503 of operations that are
    ``unavailable`` by what they need.
    """
    document = schemathesis.openapi.from_dict(api.get("/openapi.json").json())
    seen: dict[str, set[int]] = {}
    for found in document.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        statuses = seen.setdefault(operation.label, set())

        ask = _ask(api, operation.label, statuses, unavailable)
        strategies = [operation.as_strategy(GenerationMode.POSITIVE)]
        here = {each.name: known[each.name] for each in operation.path_parameters if each.name in known}
        if here:
            strategies.append(operation.as_strategy(GenerationMode.POSITIVE, path_parameters=here))
        for strategy in strategies:
            _decided(given(case=strategy)(ask), examples)()
        # What takes nothing has nothing that does not fit.
        with suppress(Unsatisfiable):
            _decided(given(case=operation.as_strategy(GenerationMode.NEGATIVE))(ask), examples)()
    return seen


def _decided(test: Callable[[], None], examples: int) -> Callable[[], None]:
    """The same examples every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(test)


def _ask(api: Api, label: str, statuses: set[int], unavailable: frozenset[str]) -> Callable[[Case[Any]], None]:
    def ask(case: Case[Any]) -> None:
        if isinstance(case.query, dict) and "wait" in case.query:
            case.query["wait"] = 0
        response = case.call(base_url=api.url, headers={"Authorization": f"Bearer {role_secret('admin')}"}, timeout=120)
        statuses.add(response.status_code)
        assert response.status_code < 500 or (response.status_code == 503 and label in unavailable), (
            f"{label} answered {response.status_code}: {response.text}"
        )
        case.validate_response(response, checks=CHECKS)

    return ask
