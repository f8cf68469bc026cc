"""Compiled views give the rows of the reference interpreter, for random ViewDefinitions and random resources."""

from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fhir_assets.fhir.path import compile_path
from fhir_assets.fhir.views import CompiledViews, parse_view
from fhir_assets_tests.support.fhirpath_reference import compute_view_rows, normalize
from fhir_assets_tests.support.random_fhirpath import objects, views


def list_iterations(selects: list[dict[str, Any]], root: str) -> Iterator[tuple[str, str]]:
    """Yield each ``forEach`` path with the type of its values."""
    for select in selects:
        over = select.get("forEach") or select.get("forEachOrNull")
        inner = root
        if over:
            types = compile_path(over, root_type=root).types
            assert types is not None
            (inner,) = types
            yield over, inner
        yield from list_iterations([*select.get("select", ()), *select.get("unionAll", ())], inner)


@given(data=st.data(), root=st.sampled_from(["Patient", "Observation"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_a_compiled_view_gives_the_rows_of_the_reference_interpreter(data: st.DataObject, root: str) -> None:
    definition = data.draw(views(root))
    resource = data.draw(objects(root))
    view = parse_view(definition)
    names = [column.name for column in view.columns]
    rows = [
        dict(zip(names, map(normalize, row), strict=True))
        for row in CompiledViews([view], empty_join=False).rows(resource)[0]
    ]
    expected = compute_view_rows(definition, resource, dict(list_iterations(definition["select"], root)))
    assert sorted(rows, key=repr) == sorted(({name: row[name] for name in names} for row in expected), key=repr)
    assert not view.fallbacks
