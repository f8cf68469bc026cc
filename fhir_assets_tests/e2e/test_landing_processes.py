"""The landing zone with processes of their own: Dagster's daemon, the command line, and killed loads."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from psycopg.errors import InvalidSchemaName, UndefinedTable

from fhir_assets.fhir.intake import visits_csv
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.warehouse.postgres.db.connections import normalise_url
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.deployment_daemon import NEVER, daemon
from fhir_assets_tests.support.landing import LandingZone
from fhir_assets_tests.support.visits import visit

START = datetime(2024, 1, 1, tzinfo=UTC)
END = datetime(2024, 3, 1, tzinfo=UTC)
RESOURCE_TYPES = ("Patient", "Encounter", "Observation")


def start(deployment: Deployment, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start ``fhir-assets landing …`` in a process of its own."""
    settings = deployment.settings
    environment = {
        **os.environ,
        "FHIR_LANDING_URL": settings.fhir_landing_url,
        "FHIR_LAST_UPDATED_GTE": "2024-01-01",
        "FHIR_PARTITION": settings.fhir_partition.value,
        "FHIR_ASSETS_HOME": str(settings.home),
        "FHIR_RESOURCE_TYPES": ",".join(settings.fhir_resource_types),
        "DB_URL": deployment.url,
        "DAGSTER_POSTGRES_URL": normalise_url(deployment.url, "psycopg2"),
    }
    environment.pop("DAGSTER_HOME", None)
    return subprocess.Popen(
        [sys.executable, "-c", "from fhir_assets.cli import main; main()", "landing", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(deployment: Deployment, *arguments: str) -> tuple[int, str, str]:
    process = start(deployment, *arguments)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output.decode(), errors.decode()


@pytest.mark.slow
def test_the_daemon_finds_receives_and_loads_files_by_itself(deploy: Deploy, tmp_path: Path) -> None:
    zone = LandingZone(str(tmp_path / "landing"))
    zone.put("first.ndjson", patient("a", START) + b"\n" + patient("b", END))
    deployment = deploy(
        fhir_landing_url=zone.url, fhir_resource_types=("Patient",), fhir_last_updated_gte=START, fhir_source="ndjson"
    )

    def has_loaded(count: int) -> bool:
        try:
            return deployment.count_loaded() == {"Patient": count}
        except (UndefinedTable, InvalidSchemaName):
            return False

    with daemon(deployment, tmp_path / "log", FHIR_LANDING_URL=zone.url, FHIR_SCHEDULE=NEVER):
        wait_until(lambda: has_loaded(2), seconds=240)
        zone.put("second.ndjson", b"{\n" + patient("c", START))
        wait_until(lambda: has_loaded(3), seconds=240)
    assert deployment.query("SELECT count(*) FROM ops.received WHERE loaded_at IS NULL") == [(0,)]
    assert deployment.count_dead_letters() == {"json": 1}


@pytest.mark.slow
def test_the_landing_command_loads_waiting_files_and_names_the_invalid_one(deploy: Deploy, tmp_path: Path) -> None:
    zone = LandingZone(str(tmp_path / "landing"))
    zone.put("good.ndjson", patient("a", START))
    zone.put("bad.ndjson", b"{\n" + patient("b", START))
    deployment = deploy(fhir_landing_url=zone.url, fhir_resource_types=("Patient",), fhir_last_updated_gte=START)
    code, output, errors = run(deployment, "load", "--json")
    assert code == 0, errors
    summary = json.loads(output)
    assert (summary["files"], summary["rows"], summary["rejected"], summary["success"]) == (2, 2, 1, True)
    code, output, errors = run(deployment, "list", "--status", "bad", "--json")
    assert code == 0, errors
    assert [file["name"] for file in json.loads(output)] == ["bad.ndjson"]
    assert deployment.count_loaded() == {"Patient": 2}


def load_clean_and_killed(
    deploy: Deploy, other_database: str, settings: dict[str, Any]
) -> tuple[Deployment, Deployment]:
    """Return a deployment loaded without interruption, and one whose load was killed five times and then completed."""
    clean = deploy(home="clean", **settings)
    started = time.monotonic()
    assert run(clean, "load")[0] == 0
    duration = time.monotonic() - started
    killed = deploy(home="killed", url=other_database, **settings)
    killed_loads = 0
    for number in range(5):
        process = start(killed, "load")
        time.sleep(random.Random(number).uniform(0.3, 0.9) * duration)
        if process.poll() is None:
            killed_loads += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert killed_loads
    code, _, errors = run(killed, "load")
    assert code == 0, errors
    return clean, killed


@pytest.mark.slow
def test_the_load_after_a_kill_at_any_moment_gives_the_tables_of_an_uninterrupted_load(
    deploy: Deploy, tmp_path: Path, empty_database: str
) -> None:
    write_population(tmp_path / "landing", Population(6, 3, 0.02, end=END, start=START))
    common = {
        "fhir_landing_url": str(tmp_path / "landing"),
        "fhir_resource_types": RESOURCE_TYPES,
        "fhir_last_updated_gte": START,
        "fhir_partition": "monthly",
    }
    clean, killed = load_clean_and_killed(deploy, empty_database, common)
    assert killed.tables() == clean.tables()
    assert killed.count_dead_letters() == clean.count_dead_letters()
    assert killed.query("SELECT count(*) FROM ops.received WHERE loaded_at IS NULL") == [(0,)]
    rows = "SELECT sum(rows), sum(rejected) FROM ops.received"
    assert killed.query(rows) == clean.query(rows)


@pytest.mark.slow
def test_the_load_of_visits_after_a_kill_at_any_moment_gives_the_tables_of_an_uninterrupted_load(
    deploy: Deploy, tmp_path: Path, empty_database: str
) -> None:
    zone = LandingZone(str(tmp_path / "landing"))
    for number in range(20):
        accounts = range(number * 300, number * 300 + 400)
        rows = [visit(f"M{n % 700}", f"V{n}", f"Name {n % 900}", reason=str(number)) for n in accounts]
        zone.put(f"{number:02}.csv", visits_csv.write(rows) + b"bad\r\n")
        os.utime(tmp_path / "landing" / f"{number:02}.csv", (END.timestamp() + number, END.timestamp() + number))
    common = {
        "fhir_landing_url": zone.url,
        "fhir_resource_types": ("Patient", "Encounter"),
        "fhir_last_updated_gte": START,
        "fhir_partition": "monthly",
    }
    clean, killed = load_clean_and_killed(deploy, empty_database, common)
    assert killed.count_loaded() == {"Patient": 700, "Encounter": 6100}
    assert killed.tables() == clean.tables()
    dead_letters = "SELECT rule, count(*) FROM ops.dead_letters GROUP BY 1 ORDER BY 1"
    assert killed.query(dead_letters) == clean.query(dead_letters) == [("csv", 1), ("visit-conflict", 1900)]
    counts = "SELECT sum(patients), sum(updates), sum(visits), sum(repeats), sum(rows), sum(rejected)"
    counts += " FROM ops.visit_files"
    assert killed.query(counts) == clean.query(counts)
    assert killed.query("SELECT sum(rows) FROM ops.received") == clean.query("SELECT sum(rows) FROM ops.received")
