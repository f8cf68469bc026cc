"""Measure the HTTP API with two workers: intake in lists of 100, and searches among a million encrypted patients.

``python -m benchmarks.api [patients] [seconds]``. The client is this process, on the same cores. The patients are
copies of one loaded patient with ids and medical record numbers (MRN) of their own, encrypted as in production.
"""

import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import dagster as dg
import orjson
from psycopg import sql

from benchmarks.machine import scratch
from fhir_assets.api.access import Role, create_token
from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.privacy.keys import new_key
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets_tests.support.api import api_environment

GOAL_INTAKE = 5_000
GOAL_P99 = 0.020
LIST = 100
CALLERS = 4
KNOWN = 2_000


def main(patients: int, seconds: float) -> int:
    """Print the figures and the goals. Return 0 in any case, because client and server share the cores."""
    logging.disable(logging.ERROR)
    secret, entry = create_token("benchmark", Role.ADMIN)
    with scratch() as folder:
        values: dict[str, object] = {
            "fhir_assets_home": folder,
            "fhir_resource_types": "Patient,Encounter,Consent",
            "phi_encryption_keys": new_key(),
            "api_tokens": entry,
            "api_rate_limit": 1_000_000,
            "metrics_port": 0,
        }
        settings = load_settings(**values)
        warehouse = Warehouse(settings)
        values["db_url"] = warehouse.url()
        port = find_free_port()
        command = [str(Path(sys.executable).with_name("fhir-assets")), "api", "--port", str(port), "--workers", "2"]
        with subprocess.Popen(command, env=api_environment(values), cwd=folder, stderr=subprocess.DEVNULL) as process:
            try:
                call = _connect_client(port, secret)
                _wait_until_live(port)
                call("POST", "/api/v1/ingest", _intake_body(0, 1))
                with dg.DagsterInstance.ephemeral() as instance:
                    ingestion = Ingestion(settings, build_definitions(settings), instance)
                    for partition in ingestion.find_received():
                        assert ingestion.load_received(partition, triggered_by="benchmark").success
                with warehouse.connect() as conn:
                    _insert_patients(conn, patients, [warehouse.cipher().index(f"K-{n}") for n in range(KNOWN)])
                _measure_searches(port, secret, patients, seconds)
                _measure_intake(port, secret, seconds)
            finally:
                process.terminate()
    return 0


Call = Callable[..., tuple[int, bytes]]


def _connect_client(port: int, secret: str) -> Call:
    connection = HTTPConnection("127.0.0.1", port, timeout=120)

    def call(method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection.request(method, path, body, {"Authorization": f"Bearer {secret}"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    return call


def _wait_until_live(port: int) -> None:
    while True:
        try:
            if _connect_client(port, "")("GET", "/health/live")[0] == 200:
                return
        except (OSError, HTTPException):
            time.sleep(0.2)


def _intake_body(start: int, count: int) -> bytes:
    return orjson.dumps(
        {
            "records": [
                {
                    "resourceType": "Patient",
                    "mrn": f"B-{n}",
                    "name": {"first": f"First{n}", "last": f"Last{n}"},
                    "birthDate": "1970-01-31",
                    "gender": "female",
                }
                for n in range(start, start + count)
            ]
        }
    )


def _insert_patients(conn: Connection, patients: int, known: list[str]) -> None:
    for schema, table in (("fhir_partitions", "resource_patient"), ("fhir", "patient")):
        columns = [
            name
            for (name,) in conn.execute(
                """
                SELECT column_name
                FROM information_schema.columns
                WHERE table_schema = %s AND table_name = %s AND is_generated = 'NEVER'
                ORDER BY ordinal_position
                """,
                [schema, table],
            )
        ]
        own: dict[str, str] = {
            "id": "md5(n::text)",
            "patients": "ARRAY[md5(n::text)]",
            "mrn_index": "encode(sha256(n::text::bytea), 'hex')",
        }
        values = [sql.SQL(own[c]) if c in own else sql.Identifier("original", c) for c in columns]
        conn.execute(
            sql.SQL(
                """
                INSERT INTO {} ({})
                SELECT {}
                FROM generate_series(1, {}) n, (SELECT * FROM {} LIMIT 1) original
                """
            ).format(
                sql.Identifier(schema, table),
                sql.SQL(", ").join(map(sql.Identifier, columns)),
                sql.SQL(", ").join(values),
                sql.Literal(patients),
                sql.Identifier(schema, table),
            )
        )
    with_known_mrn = random.Random(1).sample(range(1, patients + 1), min(len(known), patients))
    with conn.cursor() as cursor:
        cursor.executemany(
            "UPDATE fhir.patient SET mrn_index = %s WHERE id = md5(%s::text)",
            [(index, n) for index, n in zip(known, with_known_mrn, strict=False)],
        )
    conn.commit()
    conn.autocommit = True
    conn.execute("VACUUM ANALYZE fhir.patient")
    conn.execute("VACUUM ANALYZE fhir_partitions.resource_patient")
    print(f"{patients:,} encrypted patients in the tables; {os.cpu_count()} cores, two workers, {CALLERS} clients")


def _measure_searches(port: int, secret: str, patients: int, seconds: float) -> None:
    last = patients // 20
    kinds: dict[str, Callable[[random.Random], str]] = {
        "by MRN": lambda r: f"/patients?mrn=K-{r.randrange(KNOWN)}",
        "page 1": lambda r: "/patients?page=1",
        "middle page": lambda r: f"/patients?page={last // 2 + r.randrange(100)}",
        "last page": lambda r: f"/patients?page={last - r.randrange(5)}",
    }
    for callers in (1, CALLERS):
        for name, path in kinds.items():
            durations = _time_requests(port, secret, callers, seconds / 2, path)
            p99 = durations[int(len(durations) * 0.99)]
            print(
                f"{name}, {callers} concurrent: {len(durations) / (seconds / 2):,.0f}/s, median"
                f" {durations[len(durations) // 2] * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms"
                f" ({p99 / GOAL_P99:.2f} of the goal of {GOAL_P99 * 1000:.0f} ms by MRN)",
                flush=True,
            )


def _time_requests(
    port: int, secret: str, callers: int, seconds: float, path: Callable[[random.Random], str]
) -> list[float]:
    def work(number: int) -> list[float]:
        call, generator, durations = _connect_client(port, secret), random.Random(number), []
        call("GET", path(generator))
        deadline = time.perf_counter() + seconds
        while (started := time.perf_counter()) < deadline:
            status, body = call("GET", path(generator))
            durations.append(time.perf_counter() - started)
            assert status == 200, status
            assert b'"patients":[{' in body, body[:200]
        return durations

    with ThreadPoolExecutor(callers) as pool:
        return sorted(duration for durations in pool.map(work, range(callers)) for duration in durations)


def _measure_intake(port: int, secret: str, seconds: float) -> None:
    def work(number: int) -> int:
        call, sent = _connect_client(port, secret), 0
        bodies = [_intake_body(1_000_000 * number + LIST * n, LIST) for n in range(20)]
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            status, _ = call("POST", "/api/v1/ingest", bodies[sent % len(bodies)])
            assert status == 202, status
            sent += 1
        return sent

    for callers in (CALLERS, 4 * CALLERS):
        started = time.perf_counter()
        with ThreadPoolExecutor(callers) as pool:
            posts = sum(pool.map(work, range(callers)))
        rate = posts * LIST / (time.perf_counter() - started)
        print(
            f"intake, {callers} concurrent: {rate:,.0f} records/s in lists of {LIST},"
            f" {rate / GOAL_INTAKE:.2f} of the goal of {GOAL_INTAKE:,}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main(*(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, float((sys.argv[2:] or ["10"])[0]))))
