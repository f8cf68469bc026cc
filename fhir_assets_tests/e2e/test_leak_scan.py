"""The scan for leaked patient data finds a marker in every kind of location."""

import gzip
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fhir_assets.delivery.connector import outbox
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.canaries import Canaries
from fhir_assets_tests.support.deployment import Deploy
from fhir_assets_tests.support.leak_scan import LOCATIONS, Site, build_site, find_leaks

DAY = datetime(2024, 1, 5, tzinfo=UTC)


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


def plant_in_table(table: str, **values: object) -> Callable[[Site, str], None]:
    def plant(site: Site, marker: str) -> None:
        columns = ", ".join(values)
        parameters = [value.replace("MARKER", marker) if isinstance(value, str) else value for value in values.values()]
        with connect(site.url) as conn:
            statement = f"INSERT INTO {table} ({columns}) VALUES ({', '.join(['%s'] * len(parameters))})"
            conn.execute(statement.encode(), parameters)

    return plant


def plant_in_file(name: str, pack: Callable[[bytes], bytes] = bytes) -> Callable[[Site, str], None]:
    def plant(site: Site, marker: str) -> None:
        path = site.home.parent / name.replace("MARKER", marker)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(f'{{"name": "{marker}"}}\n'.encode()))

    return plant


def plant_in_server_log(site: Site, marker: str) -> None:
    with connect(site.url) as conn:
        conn.execute(f"DO $$ BEGIN RAISE LOG '%', '{marker}'; END $$".encode())


PLANTS: dict[str, list[Callable[[Site, str], None]]] = {
    "Dagster's database": [
        plant_in_table("public.kvs", key="a", value="MARKER"),
        plant_in_table("public.daemon_heartbeats", daemon_type="a", daemon_id="MARKER", timestamp="2024-01-01"),
    ],
    "Dagster's home and compute logs": [plant_in_file("home/dagster/storage/run/compute_logs/step.err")],
    "operations": [
        plant_in_table(
            "ops.ingestion_runs", run_id="r", resource_type="t", partition_key="k", status="FAILED", error="MARKER"
        ),
        plant_in_table("ops.incidents", kind="run", name="MARKER", partitions=["k"]),
    ],
    "tables": [
        plant_in_table(
            "fhir.resource",
            resource_type="Patient",
            id="a",
            as_of=DAY,
            partition_key="k",
            run_id="r",
            resource='{"id": "MARKER"}',
        )
    ],
    "outbox": [
        plant_in_table(
            "health.fhir_dlq",
            source="patient",
            record_id="1",
            txids="{1}",
            reason="refused",
            message="MARKER",
            attempts=1,
            first_change_at=DAY,
        )
    ],
    "statistics of the planner": [plant_in_table("ops.incidents", kind="run", name="MARKER", partitions=["k"])],
    "store and spool": [
        plant_in_file("home/store/.spool/part-1.ndjson.gz", gzip.compress),
        plant_in_file("home/store/raw/patient/2024/part-MARKER.ndjson.gz", gzip.compress),
    ],
    "other files": [plant_in_file("home/uploads/journal.sqlite", lambda content: b"SQLite\0" + content)],
    "temporary files": [plant_in_file("temporary/tmpabc")],
    "logs and error output": [
        plant_in_file("output/api.log"),
        plant_in_file("output/traceback", lambda content: content.hex().encode()),
        plant_in_file("output/header", lambda content: __import__("base64").b64encode(b"x" + content)),
    ],
    "log of Postgres": [plant_in_server_log],
    "metrics": [lambda site, marker: site.metrics.append(f'fhir_dead_letters{{rule="{marker}"}} 1')],
    "alerts": [lambda site, marker: site.alerts.append({"text": f"Run of {marker} failed"})],
    "answers to callers": [lambda site, marker: site.answers.append(f'{{"detail": "no {marker}"}}'.encode())],
}
"""Functions that plant a marker, by kind of location."""


def test_the_scan_finds_a_planted_marker_in_every_location(deploy: Deploy, tmp_path: Path, canaries: Canaries) -> None:
    deployment = deploy()
    with connect(deployment.url) as conn:
        outbox.install(conn)
    site = build_site(deployment, tmp_path)
    assert PLANTS.keys() == LOCATIONS.keys(), "a kind of location without a planted marker"
    assert find_leaks(site, canaries) == set()
    for location, plants in PLANTS.items():
        for number, plant in enumerate(plants):
            element = f"planted in {location} ({number})"
            plant(site, canaries.text(element))
            leaked = {element for _, _, element in find_leaks(site, canaries, location)}
            assert element in leaked or any(name.startswith("something") for name in leaked), element


@pytest.mark.parametrize(
    "form", ["{0}-{1}-{2}", "{0}/{1}/{2}", "{2}.{1}.{0}", "{1}/{2}/{0}", "datetime.date({0}, {1}, {2})"]
)
def test_the_scan_finds_a_date_in_every_format(canaries: Canaries, form: str) -> None:
    year, month, day = canaries.day("Patient.birthDate").split("-")
    assert canaries.found_in(f"born {form.format(year, month, day)}, it says".encode()) == {"Patient.birthDate"}
    assert canaries.found_in(f"{year}-01-01 and {year}-12-{day}".encode()) == set()
