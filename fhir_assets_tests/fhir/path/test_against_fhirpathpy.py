"""Compiled paths give the same results as fhirpathpy, for random paths and random resources."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fhir_assets.fhir.path import compile_path
from fhir_assets_tests.support.fhirpath_reference import evaluate, normalize
from fhir_assets_tests.support.random_fhirpath import objects, paths


@given(data=st.data(), root=st.sampled_from(["Patient", "Observation"]))
@settings(max_examples=300, deadline=None)
def test_a_compiled_path_gives_the_result_of_fhirpathpy(data: st.DataObject, root: str) -> None:
    resource: dict[str, Any] = data.draw(objects(root))
    text = data.draw(paths(root))
    path = compile_path(text, root_type=root, empty_join=False)
    assert not path.fallback
    assert normalize(path(resource)) == evaluate(resource, text, root)
