"""What the catalog of the Dagster UI shows: layers, domains, patient data, owners, and the files of tables."""

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import load_settings


@pytest.fixture(scope="module")
def graph() -> dg.Definitions:
    return build_definitions(load_settings(fhir_owners="team:data, anna@example.org"))


def read(definitions: dg.Definitions, name: str) -> dg.AssetSpec:
    key = dg.AssetKey(name.split("/"))
    return definitions.resolve_assets_def(key).specs_by_key[key]


@pytest.mark.parametrize(
    ("name", "kinds", "domain", "phi"),
    [
        ("raw/patient", {"raw", "json"}, "administration", "true"),
        ("raw/practitioner", {"raw", "json"}, "administration", "false"),
        ("validated/observation", {"validated", "json"}, "diagnostics", "true"),
        ("normalized/observation_component", {"normalized", "postgres"}, "diagnostics", "true"),
    ],
)
def test_an_asset_has_its_layer_domain_and_owners(
    graph: dg.Definitions, name: str, kinds: set[str], domain: str, phi: str
) -> None:
    spec = read(graph, name)
    assert spec.kinds == kinds
    assert {tag: spec.tags[tag] for tag in ("layer", "domain", "phi")} == {
        "layer": name.split("/")[0],
        "domain": domain,
        "phi": phi,
    }
    assert list(spec.owners) == ["team:data", "anna@example.org"]


def test_a_table_names_its_view_definition_as_code(graph: dg.Definitions) -> None:
    metadata = read(graph, "normalized/patient").metadata
    assert metadata["dagster/table_name"] == "fhir.patient"
    (reference,) = metadata["dagster/code_references"].code_references
    assert reference.file_path.endswith("patient.json")


def test_an_owner_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="FHIR_OWNERS: the data team: an owner is"):
        load_settings(fhir_owners="the data team")
