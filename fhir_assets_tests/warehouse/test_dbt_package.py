"""The dbt package: its files, the sources of the tables, and what its models fill of OMOP 5.4 and Tuva's input layer.

`make dbt-story` runs the models with dbt itself.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.views import parse_view
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.dbt.package import SOURCES_FILE, build_package, find_package_folder, write_package
from fhir_assets.warehouse.dbt.sources import build_sources
from fhir_assets.warehouse.dbt.targets import TARGETS, TargetColumn, read_target
from fhir_assets_tests.support.shipped_views import views

NULL = re.compile(r"cast\(null as [\w ]+\)")
SELECT = re.compile(r"^select\n(.*?)^from ", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return build_package(list(views().values()), lake_url=None, encrypted=False)


@pytest.fixture(scope="module")
def tables(files: dict[str, str]) -> dict[str, dict[str, Any]]:
    (source,) = yaml.load(files[SOURCES_FILE], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["sources"]
    return {table["name"]: table for table in source["tables"]}


def columns_of(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {column["name"]: column for column in table["columns"]}


def filled_columns(files: Mapping[str, str], target: str, table: str) -> dict[str, bool]:
    """Return whether a model fills a column, by the names of its columns: the last select, a line for each column."""
    model = files[f"models/{target}/{target}__{table}.sql"]
    lines = SELECT.findall(model)[-1].splitlines()
    columns = {}
    for line in lines:
        expression, separator, name = line.strip().rstrip(",").rpartition(" as ")
        assert separator, f"{target}__{table}: {line}"
        columns[name] = NULL.fullmatch(expression) is None
    return columns


def test_a_source_has_the_key_of_the_asset_that_loads_its_table(tables: dict[str, dict[str, Any]]) -> None:
    keys = {
        tuple(table["config"]["meta"]["dagster"]["asset_key"]) for name, table in tables.items() if name != "deleted"
    }
    assets = build_definitions(load_settings()).resolve_all_asset_keys()
    assert keys == {tuple(key.path) for key in assets if key.path[0] == "normalized"}


def test_every_table_has_its_key_and_descriptions(tables: dict[str, dict[str, Any]]) -> None:
    assert tables.keys() == views().keys() | {"deleted"}
    for name, table in tables.items():
        assert table["description"], name
        assert [column["name"] for column in table["columns"] if not column["description"]] == [], name
    assert tables["patient"]["data_tests"] == [{"row_key": {"arguments": {"columns": ["id"]}}}]
    assert tables["patient_address"]["data_tests"] == [
        {"row_key": {"arguments": {"columns": ["patient_key", "index"]}}}
    ]


def test_a_key_warns_of_resources_that_the_target_table_lacks(tables: dict[str, dict[str, Any]]) -> None:
    expected = {
        "reference_key": {
            "arguments": {"to": "source('fhir', 'patient')", "field": "id"},
            "config": {"severity": "warn"},
        }
    }
    assert columns_of(tables["condition"])["patient_key"]["data_tests"] == [expected]
    assert columns_of(tables["patient_address"])["patient_key"]["data_tests"] == [expected]


def test_columns_with_patient_data_and_those_derived_from_them_are_marked(tables: dict[str, dict[str, Any]]) -> None:
    patient = columns_of(tables["patient"])
    marked = {name: column["config"]["meta"]["phi"] for name, column in patient.items() if "config" in column}
    assert marked["family"] == "encrypt"
    assert {"birth_date", "birth_date_precision", "deceased_date_time", "deceased_date_time_date"} <= marked.keys()
    assert {"id", "gender", "loaded_at"}.isdisjoint(marked)


def test_a_staging_model_replaces_rows_by_the_key_of_its_table(files: dict[str, str]) -> None:
    model = files["models/staging/stg_patient_address.sql"]
    assert "unique_key=['patient_key', 'index', '_source']" in model
    assert "delete_missing_rows(this, 'patient_address', ['patient_key', 'index', '_source'])" in model


@pytest.mark.parametrize("target", TARGETS)
def test_the_models_have_the_columns_of_their_target_in_its_order(files: dict[str, str], target: str) -> None:
    specified = read_target(find_package_folder(), target)
    models = {Path(name).stem for name in files if name.startswith(f"models/{target}/") and name.endswith(".sql")}
    assert models == {f"{target}__{table}" for table in specified}
    for table, columns in specified.items():
        assert list(filled_columns(files, target, table)) == [column.name for column in columns], table


@pytest.mark.parametrize("target", TARGETS)
def test_the_models_fill_all_required_columns_and_95_of_100_that_r4_has(files: dict[str, str], target: str) -> None:
    specified = read_target(find_package_folder(), target)
    columns = [column for columns in specified.values() for column in columns]
    filled = {table: filled_columns(files, target, table) for table in specified}

    def is_filled(column: TargetColumn) -> bool:
        return filled[column.table][column.name]

    assert [column for column in columns if column.required and not is_filled(column)] == []
    in_r4 = [column for column in columns if column.in_r4]
    assert sum(map(is_filled, in_r4)) >= 0.95 * len(in_r4)
    # Nothing is left out without a reason, and nothing is filled that R4 does not have.
    assert [column for column in columns if not column.in_r4 and (is_filled(column) or not column.note)] == []


def test_init_writes_the_package_and_keeps_what_its_user_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    folder = tmp_path / "package"
    first = CliRunner().invoke(app, ["dbt", "init", str(folder)], catch_exceptions=False)
    assert first.exit_code == 0
    assert "sources.yml has 167 tables" in first.output
    model, sources = folder / "models/omop/omop__death.sql", folder / SOURCES_FILE
    generated = sources.read_text()
    model.write_text("select 1")
    sources.write_text("an older version")
    (folder / "models/tuva/tuva__patient.sql").unlink()
    again = CliRunner().invoke(app, ["dbt", "init", str(folder)], catch_exceptions=False)
    assert "2 of 87 files written" in again.output
    assert "omop__death.sql" in again.output
    assert (model.read_text(), sources.read_text()) == ("select 1", generated)
    assert (folder / "models/tuva/tuva__patient.sql").exists()


def test_init_does_not_write_among_the_files_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="name an empty folder"):
        write_package(tmp_path, {"dbt_project.yml": ""})
    with pytest.raises(ConfigurationError, match="is a file"):
        write_package(tmp_path / "notes.txt", {"dbt_project.yml": ""})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_view_of_the_deployment_is_a_source_and_one_that_the_models_read_must_exist() -> None:
    definition = {
        "resource": "Patient",
        "name": "patient_city",
        "select": [{"column": [{"name": "id", "path": "getResourceKey()"}, {"name": "city", "path": "address.city"}]}],
    }
    (source,) = build_sources([parse_view(definition)], lake_url=None, encrypted=False)["sources"]
    assert [table["name"] for table in source["tables"]] == ["patient_city", "deleted"]
    without = [view for view in views().values() if view.name != "condition"]
    with pytest.raises(ConfigurationError, match="need the view condition"):
        build_package(without, lake_url=None, encrypted=False)


# Dagster's evaluate_automation_conditions uses a parameter of its own that is in beta.
@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")
def test_models_downstream_run_after_each_load_although_windows_are_missing() -> None:
    """The condition of docs/dbt.md. ``eager()`` waits for all windows, of which some have never been loaded."""
    eager = dg.AutomationCondition.eager()
    assert _count_requests(eager) == [0, 0, 0, 0]
    assert _count_requests(eager.without(~dg.AutomationCondition.any_deps_missing())) == [0, 1, 0, 1]


def _count_requests(condition: dg.AutomationCondition[Any]) -> list[int]:
    """Return the requests of a model: before the first load, after it, after the run of the model, after a load."""

    @dg.asset(
        key=["normalized", "patient"], partitions_def=dg.DailyPartitionsDefinition("2024-01-01", end_date="2024-03-01")
    )
    def patient() -> None: ...

    @dg.asset(deps=[["normalized", "patient"]], automation_condition=condition)
    def stg_patient() -> None: ...

    definitions = dg.Definitions([patient, stg_patient])
    requests = []
    with dg.DagsterInstance.ephemeral() as instance:
        cursor = None
        for key, run in ((None, None), ("2024-01-03", None), (None, stg_patient), ("2024-01-04", None)):
            if key is not None:
                dg.materialize([patient], partition_key=key, instance=instance)
            if run is not None:
                dg.materialize([patient, run], selection=[run], instance=instance)
            result = dg.evaluate_automation_conditions(definitions, instance, cursor=cursor)
            cursor = result.cursor
            requests.append(result.total_requested)
    return requests
