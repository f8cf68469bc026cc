"""What the catalog of the Dagster UI shows: layers, domains, patient data, owners, and the files of tables."""

from pathlib import Path

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


def test_raw_and_validated_name_the_place_of_their_files_and_every_layer_links_to_the_specification() -> None:
    definitions = build_definitions(load_settings(fhir_store_url="s3://bucket/prefix", fhir_resource_types="Patient"))
    for layer in ("raw", "validated"):
        assert read(definitions, f"{layer}/patient").metadata["dagster/uri"] == f"s3://bucket/prefix/{layer}/patient"
    for layer in ("raw", "validated", "normalized"):
        link = read(definitions, f"{layer}/patient").metadata["documentation"]
        assert link == dg.MetadataValue.url("https://hl7.org/fhir/R4/patient.html")


def test_everything_that_the_ui_shows_has_a_description(tmp_path: Path) -> None:
    settings = load_settings(
        fhir_base_url="http://source.example.org/fhir",
        fhir_delivery_url="http://target.example.org/fhir",
        fhir_lake_url=str(tmp_path / "lake"),
        fhir_export_url=str(tmp_path / "exports"),
        fhir_landing_url=str(tmp_path / "landing"),
        consent_policy="opt-out",
    )
    repository = build_definitions(settings).get_repository_def()
    graph = repository.asset_graph
    jobs = [job for job in repository.get_all_jobs() if not job.name.startswith("__")]
    assert {"request_replay", "incremental_load"} <= {job.name for job in jobs}
    named: list[tuple[str, str | None]] = [
        *((f"asset {key.to_user_string()}", graph.get(key).description) for key in graph.get_all_asset_keys()),
        *((f"check {key.name} of {key.asset_key}", graph.get(key).description) for key in graph.asset_check_keys),
        *((f"job {job.name}", job.description) for job in jobs),
        *((f"op {node.name}", node.definition.description) for job in jobs for node in job.nodes),
        *((f"schedule {schedule.name}", schedule.description) for schedule in repository.schedule_defs),
        *((f"sensor {sensor.name}", sensor.description) for sensor in repository.sensor_defs),
        *(
            (f"field {name} of {node.name}", field.description)
            for job in jobs
            for node in job.nodes
            if isinstance(node.definition, dg.OpDefinition)
            for name, field in list_fields(node.definition).items()
        ),
    ]
    assert len(named) > 300
    assert [name for name, description in named if not description] == []


def list_fields(op: dg.OpDefinition) -> dict[str, dg.Field]:
    return dict(getattr(op.config_schema.config_type, "fields", None) or {})
