"""The dbt package with dbt itself: on Postgres as a reader, and on the lake with DuckDB (`make dbt-story`)."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest
from psycopg.conninfo import conninfo_to_dict
from typer.testing import CliRunner

from fhir_assets.cli.lake import write_lake
from fhir_assets.cli.main import app
from fhir_assets.definitions import build_definitions
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.warehouse.dbt.package import find_package_folder
from fhir_assets.warehouse.dbt.targets import read_target
from fhir_assets.warehouse.postgres.db.connections import Connection, connect, normalise_url
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.lake_rows import plain
from fhir_assets_tests.support.small_population import END, START

pytestmark = [
    pytest.mark.slow,
    # dagster-dbt imports sqlglot, which imports a deprecated module. Parts of dagster-dbt are in preview or beta.
    pytest.mark.filterwarnings(
        "ignore:sqlglotrs is deprecated",
        "ignore::dagster.BetaWarning",
        "ignore::dagster.PreviewWarning",
    ),
]
DBT = Path(sys.executable).parent / "dbt"
READER = "dbt_story_reader"
BOOKKEEPING = {"ingest_datetime"}
"""Columns that comparisons leave out."""


@pytest.fixture
def deployment(deploy: Deploy, tmp_path: Path) -> Deployment:
    """All types of a small population in the tables and in the lake, and a login that may read and create schemas."""
    if not DBT.exists():
        pytest.skip("dbt is not installed: make dbt-story")
    write_population(tmp_path / "population", Population(8, 3, 0.05, end=END, start=START))
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(tmp_path / "population"),
        fhir_last_updated_gte="2024-01-01",
        fhir_partition="monthly",
        fhir_lake_url=str(tmp_path / "lake"),
    )
    assert all(outcome.success for outcome in deployment.ingest())
    write_lake(deployment.settings, None, actor="test")
    with connect(deployment.url, autocommit=True) as conn:
        if not conn.execute("SELECT FROM pg_roles WHERE rolname = %s", [READER]).fetchall():
            conn.execute(f"CREATE ROLE {READER} LOGIN IN ROLE fhir_reader")
        conn.execute(f"GRANT CREATE ON DATABASE {conn.info.dbname} TO {READER}")
    return deployment


class Package:
    """The package in a folder, and dbt's commands on one of its two targets."""

    def __init__(self, folder: Path, target: str, variables: Mapping[str, str]) -> None:
        self.folder = folder
        self.target = target
        self.variables = variables

    def run(self, command: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(DBT), "--no-use-colors", command, "--profiles-dir", ".", "--target", self.target, *arguments],
            cwd=self.folder,
            env={
                **os.environ,
                **self.variables,
                "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
                "DBT_TARGET_PATH": f"target-{self.target}",
                "NO_PROXY": "*",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder / f"target-{self.target}" / "manifest.json").read_text())
        return manifest


@pytest.fixture
def folder(deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in deployment.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FHIR_LAKE_URL", str(tmp_path / "lake"))
    result = CliRunner().invoke(app, ["dbt", "init", str(tmp_path / "package")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return tmp_path / "package"


def rows_of(columns: list[str], rows: list[tuple[Any, ...]]) -> Counter[str]:
    kept = [n for n, name in enumerate(columns) if name not in BOOKKEEPING]
    return Counter(repr([as_number(plain(row[n])) for n in kept]) for row in rows)


def as_number(value: object) -> object:
    """Return a number that is text or a number as one form of it."""
    try:
        return float(str(value)) if not isinstance(value, bool) else value
    except ValueError:
        return value


def test_the_models_have_the_same_rows_on_postgres_and_on_the_lake(
    deployment: Deployment, folder: Path, tmp_path: Path
) -> None:
    parameters = conninfo_to_dict(normalise_url(deployment.url))
    postgres = Package(
        folder,
        "postgres",
        {
            "FHIR_DBT_HOST": str(parameters["host"]),
            "FHIR_DBT_PORT": str(parameters.get("port") or 5432),
            "FHIR_DBT_USER": READER,
            "FHIR_DBT_DATABASE": str(parameters["dbname"]),
        },
    )
    sources = [f"source:fhir.{name}" for name in ("patient", "observation", "observation_component", "deleted")]
    models = ["staging", "vocabulary", "omop", "tuva"]
    # Only the tests of these, not those of every key that leads to one of them.
    postgres.run("build", "--indirect-selection", "cautious", "--select", *sources, *models)
    path = tmp_path / "models.duckdb"
    code = _create_vocabulary(deployment, path)
    lake = Package(folder, "duckdb", {"FHIR_DBT_DUCKDB": str(path)})
    lake.run("run", "--vars", "{omop_vocabulary: vocabulary}")
    different = {}
    with connect(deployment.url) as conn, duckdb.connect(str(path), read_only=True) as files:
        for target in ("omop", "tuva"):
            for table, specified in read_target(find_package_folder(), target).items():
                if table == "condition_occurrence":
                    continue
                columns = [column.name for column in specified]
                query = f"SELECT {', '.join(columns)} FROM analytics_{target}.{table}"
                here = rows_of(columns, conn.execute(query).fetchall())
                there = rows_of(columns, files.execute(query).fetchall())
                if here != there:
                    different[table] = ((here - there).most_common(1), (there - here).most_common(1))
        assert not different, "\n".join(f"{table}: {rows}" for table, rows in different.items())
        assert deployment.query("SELECT count(*) FROM analytics_omop.person") == deployment.query(
            "SELECT count(*) FROM fhir.patient"
        )
        _check_concepts(conn, files, code)
    _check_increments(deployment, postgres)
    _check_lineage(deployment, postgres)


def _check_increments(deployment: Deployment, package: Package) -> None:
    """A row that became visible late, a changed and a deleted one are in the models after the next run."""
    with connect(deployment.url) as conn:
        (late, changed, deleted), *_ = conn.execute(
            "SELECT array_agg(id ORDER BY id) FROM (SELECT id FROM fhir.patient ORDER BY id LIMIT 3) p"
        ).fetchone() or ([],)
        conn.execute("DELETE FROM analytics_staging.stg_patient WHERE id = %s", [late])
        conn.execute("UPDATE fhir.patient SET loaded_at = loaded_at - interval '1 minute' WHERE id = %s", [late])
        conn.execute("UPDATE fhir.patient SET gender = 'other', loaded_at = now() WHERE id = %s", [changed])
        conn.execute("DELETE FROM fhir.patient WHERE id = %s", [deleted])
        conn.execute("DELETE FROM fhir.patient_address WHERE patient_key = %s", [changed])
    package.run("run", "--select", "stg_patient", "stg_patient_address")
    rows = "SELECT id, gender FROM {} ORDER BY 1"
    assert deployment.query(rows.format("analytics_staging.stg_patient")) == deployment.query(
        rows.format("fhir.patient")
    )
    rows = 'SELECT patient_key, "index", city FROM {} ORDER BY 1, 2'
    assert deployment.query(rows.format("analytics_staging.stg_patient_address")) == deployment.query(
        rows.format("fhir.patient_address")
    )


def _check_lineage(deployment: Deployment, package: Package) -> None:
    """The models of dagster-dbt are downstream of the assets that load the tables."""
    from dagster_dbt import DagsterDbtTranslator, DbtCliResource, dbt_assets

    class Translator(DagsterDbtTranslator):  # type: ignore[misc]  # dagster-dbt is not installed where mypy runs
        def get_automation_condition(self, dbt_resource_props: Mapping[str, Any]) -> dg.AutomationCondition[Any]:
            return dg.AutomationCondition.eager().without(~dg.AutomationCondition.any_deps_missing())

    @dbt_assets(manifest=package.manifest, dagster_dbt_translator=Translator())  # type: ignore[untyped-decorator]
    def models(context: dg.AssetExecutionContext, dbt: DbtCliResource) -> Any:
        yield from dbt.cli(["build"], context=context).stream()

    dbt = DbtCliResource(project_dir=str(package.folder), dbt_executable=str(DBT), profiles_dir=str(package.folder))
    definitions = dg.Definitions.merge(
        build_definitions(deployment.settings), dg.Definitions([models], resources={"dbt": dbt})
    )
    graph = definitions.resolve_asset_graph()
    model = graph.get(dg.AssetKey(["staging", "stg_patient"]))
    assert model.parent_keys == {dg.AssetKey(["normalized", "patient"])}
    assert graph.get(dg.AssetKey(["normalized", "patient"])).is_materializable
    assert dg.AssetKey(["tuva", "tuva__patient"]) in graph.get_all_asset_keys()
    assert model.automation_condition is not None


def _create_vocabulary(deployment: Deployment, path: Path) -> str:
    """Create a vocabulary with one code, which maps to two standard concepts. Return the code, of some conditions."""
    ((system, code),) = deployment.query("SELECT code_system, code FROM fhir.condition WHERE code IS NOT NULL LIMIT 1")
    assert system == "http://snomed.info/sct"
    with duckdb.connect(str(path)) as conn:
        conn.execute("CREATE SCHEMA vocabulary")
        conn.execute(
            "CREATE TABLE vocabulary.concept AS SELECT 1 AS concept_id, ? AS concept_code, 'SNOMED' AS vocabulary_id,"
            " cast(null AS text) AS standard_concept",
            [code],
        )
        conn.execute(
            "CREATE TABLE vocabulary.concept_relationship AS SELECT 1 AS concept_id_1, to_id AS concept_id_2,"
            " 'Maps to' AS relationship_id, cast(null AS text) AS invalid_reason FROM (VALUES (11), (12)) v (to_id)"
        )
    return str(code)


def _check_concepts(without: Connection, with_vocabulary: duckdb.DuckDBPyConnection, code: str) -> None:
    """A code of the vocabulary has a row for each of its standard concepts, all other codes have concept 0."""
    query = """
        SELECT condition_source_value, condition_concept_id, condition_source_concept_id, count(*)
        FROM analytics_omop.condition_occurrence
        GROUP BY 1, 2, 3
    """
    counts = {value: count for value, _, _, count in without.execute(query).fetchall()}
    expected = {(value, 0, 0, count) for value, count in counts.items() if value != code}
    expected |= {(code, 11, 1, counts[code]), (code, 12, 1, counts[code])}
    assert set(with_vocabulary.execute(query).fetchall()) == expected
