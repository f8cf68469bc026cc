"""Bulk Data export through to the tables: at every level, through faults and kills, deletions too."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import orjson
import pytest
import requests
from joserfc.jwk import ECKey, RSAKey

from fhir_assets.cli.ingest import load_due
from fhir_assets.errors import FhirAssetsError
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.sandbox.smart import Smart
from fhir_assets.warehouse.postgres.db.connections import normalise_url
from fhir_assets_tests.support.content import add, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.export_faults import EXPORT_FAULTS

START = datetime(2024, 1, 1, tzinfo=UTC)
END = datetime(2024, 2, 1, tzinfo=UTC)
FEW = "Patient,Encounter,Condition,Observation"
KINDS = frozenset({RequestKind.KICK_OFF, RequestKind.POLL, RequestKind.FILE})


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("population")
    write_population(folder, Population(4, 7, 0.05, end=END, start=START))
    return folder


@dataclass(frozen=True)
class Expected:
    """The tables and dead letters after a load of the same resources from files."""

    tables: dict[str, list[str]]
    dead: dict[str, int]


@pytest.fixture(scope="module")
def known() -> dict[str, Expected]:
    return {}


@pytest.fixture
def clean(deploy: Deploy, population: Path, empty_database: str, known: dict[str, Expected]) -> Expected:
    if "expected" not in known:
        deployment = deploy(
            home="files",
            url=empty_database,
            fhir_source="ndjson",
            fhir_base_url=str(population),
            fhir_partition="monthly",
            fhir_resource_types=FEW,
        )
        deployment.ingest()
        known["expected"] = Expected(deployment.tables(), deployment.count_dead_letters())
    return known["expected"]


def bulk(deploy: Deploy, server: SandboxServer, **settings: Any) -> Deployment:
    values = {"fhir_partition": "monthly", "fhir_resource_types": FEW, **settings}
    return deploy(home="bulk", fhir_source="bulk", fhir_base_url=server.url, **values)


def load(deployment: Deployment) -> None:
    outcomes = deployment.ingest()
    assert outcomes
    assert all(outcome.success for outcome in outcomes)
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)


def test_a_bulk_export_gives_the_same_tables_as_files(deploy: Deploy, population: Path, clean: Expected) -> None:
    with SandboxServer(population, export_file_resources=50) as server:
        deployment = bulk(deploy, server)
        load(deployment)
        stats = server.stats()
    assert deployment.tables() == clean.tables
    assert deployment.count_dead_letters() == clean.dead
    assert stats["kick_offs"] == 1
    assert stats["requests"]["delete"] == 1, "the job is deleted on the server"


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind=FaultKind.ERROR, on=frozenset({RequestKind.KICK_OFF}), times=2, status=503),
        Fault(kind=FaultKind.THROTTLE, on=KINDS, every=2, retry_after=0, retry_after_date=True, times=20),
        Fault(kind=FaultKind.ERROR, on=frozenset({RequestKind.POLL}), every=2, status=502, times=4),
        Fault(kind=FaultKind.RESET, on=frozenset({RequestKind.POLL, RequestKind.FILE}), every=3),
        Fault(kind=FaultKind.DROP, on=frozenset({RequestKind.FILE}), every=2),
        Fault(kind=FaultKind.TRUNCATE, on=frozenset({RequestKind.FILE}), every=3),
        Fault(kind=FaultKind.EXPIRE, on=frozenset({RequestKind.FILE}), after=5, times=1),
    ],
    ids=["kick-off-503", "throttled", "poll-502", "reset", "drop", "truncated", "file-gone"],
)
def test_transient_failures_end_in_complete_tables(
    deploy: Deploy, population: Path, clean: Expected, fault: Fault
) -> None:
    with SandboxServer(population, faults=(fault,), export_file_resources=40) as server:
        deployment = bulk(deploy, server, fhir_max_attempts=12)
        load(deployment)
        assert server.stats()["struck"][fault.kind]
    assert deployment.tables() == clean.tables
    assert deployment.count_dead_letters() == clean.dead


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "on"), EXPORT_FAULTS, ids=[f"{kind}-{on}" for kind, on in EXPORT_FAULTS])
def test_each_sandbox_fault_ends_in_complete_tables_or_a_clear_error(
    deploy: Deploy, population: Path, clean: Expected, kind: FaultKind, on: RequestKind
) -> None:
    fault = Fault(kind=kind, on=frozenset({on}), times=2, retry_after=0, seconds=0.01)
    with SandboxServer(population, faults=(fault,), export_file_resources=40) as server:
        deployment = bulk(deploy, server, fhir_max_attempts=3)
        message = ""
        try:
            succeeded = all(outcome.success for outcome in deployment.ingest())
        except FhirAssetsError as error:
            succeeded, message = False, str(error)
        assert server.stats()["struck"][kind]
        assert not message or re.search(r"[a-z ]{20}", message)
        if succeeded:
            assert deployment.tables() == clean.tables
        server.set_faults()
        load(deployment)
    assert deployment.tables() == clean.tables
    assert deployment.count_dead_letters() == clean.dead


@pytest.mark.slow
def test_all_faults_together_end_in_complete_tables(deploy: Deploy, population: Path, clean: Expected) -> None:
    faults = (
        Fault(kind=FaultKind.THROTTLE, on=KINDS, every=7, retry_after=0),
        Fault(kind=FaultKind.ERROR, on=KINDS, every=5, status=503),
        Fault(kind=FaultKind.RESET, on=KINDS - {RequestKind.KICK_OFF}, every=11),
        Fault(kind=FaultKind.DROP, on=frozenset({RequestKind.FILE}), every=4),
        Fault(kind=FaultKind.TRUNCATE, on=frozenset({RequestKind.FILE}), every=6),
    )
    with SandboxServer(population, faults=faults, export_file_resources=20) as server:
        deployment = bulk(deploy, server, fhir_max_attempts=12)
        load(deployment)
    assert deployment.tables() == clean.tables


@pytest.mark.parametrize("by", [3, -3])
def test_a_file_that_differs_from_its_count_is_loaded_and_its_windows_are_red(
    deploy: Deploy, population: Path, clean: Expected, by: int
) -> None:
    wrong = Fault(kind=FaultKind.WRONG_TOTAL, on=frozenset({RequestKind.POLL}), by=by)
    with SandboxServer(population, faults=(wrong,)) as server:
        deployment = bulk(deploy, server, fhir_max_attempts=2)
        outcomes = deployment.ingest()
    assert deployment.tables() == clean.tables
    assert deployment.count_dead_letters() == clean.dead
    faults = [fault for outcome in outcomes for fault in deployment.unreconciled(outcome)]
    assert faults
    assert any("that the server's manifest states" in str(fault) for fault in faults)


def test_the_next_export_requests_changes_since_the_last_one_and_applies_deletions(deploy: Deploy) -> None:
    with SandboxServer([patient(f"p{n}", START) for n in range(3)]) as server:
        deployment = bulk(deploy, server, fhir_bulk_fresh_minutes=0, fhir_last_updated_gte="2024-01-01")
        load(deployment)
        add(server, patient("p0", datetime.now(UTC), version="2", gender="female"))
        assert _delete(server, "p1") == 204
        deployment.ingest()
        recent = [line for line in server.stats()["recent"] if "$export" in line]
    assert "_since=" in recent[-1]
    assert deployment.query("SELECT id, gender FROM fhir.patient ORDER BY id") == [("p0", "female"), ("p2", None)]
    assert deployment.query("SELECT id FROM fhir.resource WHERE deleted_at IS NOT NULL") == [("p1",)]


def _delete(server: SandboxServer, patient_id: str) -> int:
    return requests.delete(f"{server.url}/Patient/{patient_id}", timeout=10).status_code


def test_a_group_export_loads_only_the_patients_of_the_group(deploy: Deploy) -> None:
    group = {"resourceType": "Group", "id": "g", "member": [{"entity": {"reference": "Patient/p1"}}]}
    bodies = [patient(f"p{n}", START) for n in range(3)]
    for n in range(3):
        condition = {"resourceType": "Condition", "id": f"c{n}", "subject": {"reference": f"Patient/p{n}"}}
        bodies.append(orjson.dumps({**condition, "meta": {"lastUpdated": "2024-01-02T00:00:00Z"}}))
    with SandboxServer([*bodies, orjson.dumps(group)]) as server:
        deployment = bulk(deploy, server, fhir_bulk_level="group/g")
        load(deployment)
    assert deployment.query("SELECT resource_type, id FROM fhir.resource ORDER BY 1") == [
        ("Condition", "c1"),
        ("Patient", "p1"),
    ]


def test_an_error_file_of_the_export_becomes_dead_letters_of_stage_export(deploy: Deploy) -> None:
    with SandboxServer([patient("p", START)], all_types=False) as server:
        deployment = bulk(deploy, server, fhir_resource_types="Patient,Encounter")
        load(deployment)
    [(stage, rule, message)] = deployment.query("SELECT stage, rule, message FROM ops.dead_letters")
    assert (stage, rule) == ("export", "export-error")
    assert "not-supported" in message


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["RS384", "ES384"])
def test_a_token_that_expires_during_a_download_is_renewed(
    deploy: Deploy, population: Path, clean: Expected, algorithm: str, tmp_path: Path
) -> None:
    key = RSAKey.generate_key(2048) if algorithm == "RS384" else ECKey.generate_key("P-384")
    file = tmp_path / "key.pem"
    file.write_bytes(key.as_pem(private=True))
    smart = Smart({"client": key.as_dict(private=False)}, lifetime=0.4)
    slow = Fault(kind=FaultKind.SLOW, on=frozenset({RequestKind.FILE}), seconds=0.2)
    with SandboxServer(population, faults=(slow,), smart=smart, export_file_resources=10) as server:
        deployment = bulk(
            deploy, server, fhir_auth_client_id="client", fhir_auth_private_key_file=file, fhir_max_attempts=12
        )
        load(deployment)
    assert smart.issued > 2
    assert deployment.tables() == clean.tables


def test_search_authenticates_with_a_client_secret(deploy: Deploy) -> None:
    smart = Smart({"client": "s3cret"})
    with SandboxServer([patient("p", START)], smart=smart) as server:
        settings: dict[str, Any] = {
            "fhir_base_url": server.url,
            "fhir_partition": "monthly",
            "fhir_resource_types": FEW,
        }
        deployment = deploy(**settings, fhir_auth_client_id="client", fhir_auth_client_secret="s3cret")
        load(deployment)
    assert deployment.count_loaded() == {"Patient": 1}


def command(deployment: Deployment) -> tuple[list[str], dict[str, str]]:
    settings = deployment.settings
    environment = {
        **os.environ,
        "FHIR_SOURCE": "bulk",
        "FHIR_BASE_URL": settings.fhir_base_url,
        "FHIR_ASSETS_HOME": str(settings.home),
        "FHIR_PARTITION": "monthly",
        "FHIR_RESOURCE_TYPES": FEW,
        "DB_URL": deployment.url,
        "DAGSTER_POSTGRES_URL": normalise_url(deployment.url, "psycopg2"),
    }
    environment.pop("DAGSTER_HOME", None)
    return [sys.executable, "-c", "from fhir_assets.cli import main; main()", "ingest"], environment


@pytest.fixture
def slow_server(population: Path) -> Iterator[SandboxServer]:
    slow = (
        Fault(kind=FaultKind.SLOW, on=frozenset({RequestKind.POLL}), seconds=0.4),
        Fault(kind=FaultKind.SLOW, on=frozenset({RequestKind.FILE}), seconds=0.1),
    )
    with SandboxServer(population, faults=slow, export_polls=4, export_file_resources=30) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["poll", "file", "loading"])
def test_a_killed_run_resumes_the_same_export(
    deploy: Deploy, clean: Expected, slow_server: SandboxServer, moment: str
) -> None:
    deployment = bulk(deploy, slow_server)
    arguments, environment = command(deployment)
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not _reached(deployment, slow_server, moment) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(arguments, env=environment, check=True, capture_output=True, timeout=300)
    assert slow_server.stats()["kick_offs"] == 1
    assert deployment.tables() == clean.tables
    assert deployment.count_dead_letters() == clean.dead


def _reached(deployment: Deployment, server: SandboxServer, moment: str) -> bool:
    if moment == "loading":
        try:
            return bool(deployment.query("SELECT count(*) FROM fhir.resource")[0][0])
        except Exception:
            return False
    seen: int = server.stats()["requests"].get(moment, 0)
    return seen >= 2


def test_the_progress_of_an_export_is_shown_in_step_events_and_on_the_terminal(
    deploy: Deploy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with SandboxServer([patient("p0", START)]) as server:
        deployment = bulk(deploy, server, fhir_last_updated_gte="2024-01-01")
        monkeypatch.setenv("DAGSTER_HOME", str(deployment.settings.home / "dagster"))
        (outcome,) = load_due(deployment.settings, first=START, last=START)
    assert outcome.success
    records = deployment.instance.get_records_for_run(
        outcome.run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION
    ).records
    events = [str(record.event_log_entry.asset_observation) for record in records]
    terminal = capsys.readouterr().err.splitlines()
    for lines in (events, terminal):
        assert any("66 % done" in line for line in lines)
        assert any("downloaded 1 of 1 files, 1 resources" in line for line in lines)
