"""Random paths over random resources give the same, compiled and evaluated by fhirpathpy."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fhir_assets.fhir.path import compile_path
from fhir_assets_tests.support.fhirpath_reference import evaluate, plain
from fhir_assets_tests.support.random_fhirpath import objects, paths


@given(data=st.data(), root=st.sampled_from(["Patient", "Observation"]))
@settings(max_examples=300, deadline=None)
def test_a_path_gives_what_fhirpathpy_gives(data: st.DataObject, root: str) -> None:
    resource: dict[str, Any] = data.draw(objects(root))
    text = data.draw(paths(root))
    path = compile_path(text, root_type=root, empty_join=False)
    assert not path.fallback
    assert plain(path(resource)) == evaluate(resource, text, root)
