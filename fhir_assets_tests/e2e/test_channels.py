"""Realistic input through files and search: every resource is loaded or recorded as a dead letter."""

import gzip
import os
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest

from fhir_assets.catalog import BY_NAME
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.deployment import SHARED, Deploy
from fhir_assets_tests.support.faults import ALL_FAULTS

pytestmark = pytest.mark.slow

START = datetime(2024, 1, 1, tzinfo=UTC)
END = datetime(2024, 2, 1, tzinfo=UTC)
SYNTHEA = SHARED / "synthea"
needs_shared = pytest.mark.skipif(not SYNTHEA.exists(), reason="the shared data is not beside this checkout")


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("population")
    write_population(folder, Population(4, 7, 0.05, end=END, start=START))
    return folder


def lines_by_type(folder: Path) -> Counter[str]:
    return Counter({path.name.split(".")[0]: sum(1 for _ in gzip.open(path)) for path in folder.glob("*.ndjson.gz")})


def test_files_load_completely_and_each_known_defect_becomes_a_dead_letter_with_its_rule(
    deploy: Deploy, population: Path
) -> None:
    deployment = deploy(fhir_source="ndjson", fhir_base_url=str(population), fhir_partition="monthly")
    outcomes = deployment.ingest()
    assert [outcome.success for outcome in outcomes] == [True]
    assert deployment.unreconciled(outcomes[0]) == []
    broken = orjson.loads((population / ".defects.json").read_bytes())
    assert broken
    dead_letters = deployment.query(
        "SELECT resource_type, resource_id, rule FROM ops.dead_letters WHERE status = 'open'"
    )
    rules_of_dead_letters = {(kind, identity): rule for kind, identity, rule in dead_letters}
    assert rules_of_dead_letters == {(b["resourceType"], b["id"]): b["rule"] for b in broken}
    bad = Counter(b["resourceType"] for b in broken)
    assert Counter(deployment.count_loaded()) == lines_by_type(population) - bad


@pytest.mark.slow
def test_loading_the_same_files_again_changes_nothing(deploy: Deploy, population: Path) -> None:
    deployment = deploy(fhir_source="ndjson", fhir_base_url=str(population), fhir_partition="monthly")
    deployment.ingest()
    tables, dead = deployment.tables(), deployment.count_dead_letters()
    assert deployment.ingest() == []
    again = deployment.ingest(first=START, last=START)
    assert [outcome.success for outcome in again] == [True]
    assert deployment.tables() == tables
    assert deployment.count_dead_letters() == dead


@pytest.mark.slow
def test_a_search_with_every_fault_gives_the_same_tables_as_files(
    deploy: Deploy, population: Path, empty_database: str
) -> None:
    files = deploy(home="files", fhir_source="ndjson", fhir_base_url=str(population), fhir_partition="monthly")
    assert all(outcome.success for outcome in files.ingest())
    with SandboxServer(population, faults=ALL_FAULTS) as server:
        search = deploy(
            home="search",
            url=empty_database,
            fhir_base_url=server.url,
            fhir_partition="monthly",
            fhir_page_size=10,
            fhir_max_attempts=12,
        )
        outcomes = search.ingest()
        injected = server.stats()["struck"]
    assert all(outcome.success for outcome in outcomes)
    assert [search.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)
    assert {kind for kind, times in injected.items() if times} == {fault.kind for fault in ALL_FAULTS}
    assert search.tables() == files.tables()
    assert search.count_dead_letters() == files.count_dead_letters()


@pytest.mark.slow
@needs_shared
def test_all_synthea_resources_are_loaded(deploy: Deploy) -> None:
    deployment = deploy(fhir_source="ndjson", fhir_base_url=str(SYNTHEA), fhir_partition="monthly")
    outcomes = deployment.ingest()
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)
    assert deployment.count_loaded() == lines_by_type(SYNTHEA)
    assert sum(deployment.count_loaded().values()) == 8421


@pytest.mark.slow
@needs_shared
def test_the_published_examples_of_the_30_types_all_load(deploy: Deploy, tmp_path: Path) -> None:
    file = tmp_path / "examples.ndjson.gz"
    shutil.copyfile(SHARED / "r4-examples" / "examples.ndjson.gz", file)
    # Most examples have no lastUpdated: they belong to the window in which their file was written.
    os.utime(file, (START.timestamp(), START.timestamp()))
    deployment = deploy(fhir_source="ndjson", fhir_base_url=str(file), fhir_partition="monthly")
    outcomes = deployment.ingest()
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)
    assert deployment.count_dead_letters() == {}
    with gzip.open(file) as lines:
        kinds = Counter(orjson.loads(line)["resourceType"] for line in lines)
    assert deployment.count_loaded() == {kind: count for kind, count in kinds.items() if kind in BY_NAME}


def test_a_resource_without_last_updated_in_an_old_file_belongs_to_the_first_window(
    deploy: Deploy, tmp_path: Path
) -> None:
    file = tmp_path / "Patient.ndjson"
    dated = b'{"resourceType":"Patient","id":"dated","meta":{"lastUpdated":"2023-12-31T23:59:59Z"}}'
    file.write_bytes(b'{"resourceType":"Patient","id":"undated"}\n' + dated + b"\n")
    os.utime(file, (0, 0))
    deployment = deploy(fhir_source="ndjson", fhir_base_url=str(file), fhir_last_updated_gte=START)
    outcomes = deployment.ingest()
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]]
    loaded = deployment.query("SELECT id, partition_key FROM fhir.resource")
    assert loaded == [("undated", "2024-01-01")]
