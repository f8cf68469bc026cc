"""Patient data does not leak: markers pass through the whole pipeline while every step fails at least once, and are
found in encrypted data only.
"""

import gzip
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from fhir_assets.delivery.connector import outbox
from fhir_assets.metrics.exposition import render_metrics
from fhir_assets.metrics.pipeline import register_database_metrics
from fhir_assets.orchestration.jobs import CHECK_TABLES
from fhir_assets.privacy.keys import new_key
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.alerts import AlertsSensor, receive_webhooks
from fhir_assets_tests.support.api import Serve, api_processes
from fhir_assets_tests.support.canaries import Canaries, Population
from fhir_assets_tests.support.canary_pipeline import Pipeline
from fhir_assets_tests.support.content import add
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.echoing_server import EchoServer, serve_echo
from fhir_assets_tests.support.landing import LandingZone, definitions, receive, tick
from fhir_assets_tests.support.leak_scan import build_site, find_leaks

DAY = datetime(2024, 1, 5, tzinfo=UTC)
TYPES = "Patient,Practitioner,Encounter,Observation,DocumentReference,DiagnosticReport,Coverage"
MRN = "http://hospital.example.org/ids"


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def serve(database: str, tmp_path: Path) -> Iterator[Serve]:
    with api_processes(database, tmp_path) as start:
        yield start


@pytest.fixture
def pipeline(deploy: Deploy, tmp_path: Path) -> Pipeline:
    views = tmp_path / "views"
    views.mkdir()
    for name, select in FAILING_VIEWS.items():
        definition = {"resourceType": "ViewDefinition", "name": name, "status": "active", "resource": "Patient"}
        (views / f"{name}.json").write_text(json.dumps({**definition, "select": [{"column": [select]}]}))
    (tmp_path / "landing").mkdir()
    deployment = deploy(
        fhir_base_url="http://127.0.0.1:9/fhir",
        fhir_resource_types=TYPES,
        fhir_last_updated_gte="2024-01-01",
        fhir_views=views,
        fhir_landing_url=str(tmp_path / "landing"),
        fhir_max_attempts=1,
        phi_encryption_keys=new_key(),
        dead_letter_error_rate=0.01,
    )
    return Pipeline(deployment, build_site(deployment, tmp_path))


FAILING_VIEWS = {
    # Fails for a resource with two old names.
    "one_name": {"name": "old", "path": "name.where(use = 'old').family", "type": "string"},
    # Fails for a text that is not an integer.
    "number": {
        "name": "rank",
        "path": "extension.where(url = 'http://x.org/rank').value.ofType(string)",
        "type": "integer",
    },
}
"""Views that some resources do not fit. Their columns are not encrypted."""


def refuse(conn: Any, table: str, condition: str, marker: str, sqlstate: str) -> None:
    """Make the database refuse the rows, with an error that quotes the row and a marker in every field."""
    name = f"refuse_{table.replace('.', '_')}"
    conn.execute(
        f"CREATE OR REPLACE FUNCTION public.{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" RAISE EXCEPTION 'no: % {marker}', NEW USING DETAIL = NEW::text || '{marker}', HINT = '{marker}',"
        f" ERRCODE = '{sqlstate}', CONSTRAINT = '{marker}', COLUMN = '{marker}'; END $$;"
        f"CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON {table} FOR EACH ROW WHEN ({condition})"
        f" EXECUTE FUNCTION public.{name}();".encode()
    )
    conn.commit()


@pytest.mark.slow
def test_no_patient_data_leaks_outside_encrypted_storage(
    pipeline: Pipeline, serve: Serve, tmp_path: Path, canaries: Canaries, capfd: pytest.CaptureFixture[str]
) -> None:
    site, deployment, mark = pipeline.site, pipeline.deployment, canaries.text
    population = Population(canaries, DAY + timedelta(hours=8))
    resources = [body for n in range(3) for body in population.everything(f"p{n}")]

    with SandboxServer(resources) as server, receive_webhooks() as hook, serve_echo() as echo:
        source = {"FHIR_BASE_URL": server.url}
        # Valid resources, invalid ones, and ones that the views cannot turn into rows
        rank = [{"url": "http://x.org/rank", "valueString": mark("an extension")}]
        twice = [{"use": "old", "family": mark("an old name")}, {"use": "old", "family": mark("another")}]
        add(
            server,
            *population.invalid("p0"),
            population.patient("two-names", name=twice),
            population.patient("no-number", extension=rank),
        )
        assert pipeline.ingest(DAY, **source) == 0
        assert pipeline.deployment.count_loaded()["Patient"] >= 3
        assert len(deployment.count_dead_letters()) >= 5

        # A server that fails and quotes resources; a page that is not JSON
        echo.body = b'{"resourceType":"Bundle","type":"searchset","entry":[{"resource":' + resources[0]
        assert pipeline.run("sources", "carry-over", FHIR_BASE_URL=echo.url) == 0
        for status in (500, 422, 200):
            echo.status = status
            echo.received.clear()
            assert pipeline.ingest(DAY + timedelta(days=1), FHIR_BASE_URL=echo.url) != 0
            assert echo.received
        assert pipeline.run("sources", "list", **source) in (0, 1, 75, 78)
        assert pipeline.run("sources", "carry-over", **source) == 0
        echo.body = None
        server.set_faults(Fault(kind=FaultKind.TRUNCATE, on=frozenset({RequestKind.SEARCH})))
        assert pipeline.ingest(DAY + timedelta(days=1), **source) != 0
        server.set_faults()

        # A killed process
        for n in range(100):
            add(server, population.patient(f"many{n}"))
        pipeline.killed(DAY, **source)

        # A database that refuses rows: those of a view, and the whole load
        with connect(site.url) as conn:
            refuse(conn, "fhir.patient_name", "true", mark("data error"), "22000")
        assert pipeline.ingest(DAY, **source) == 0
        assert deployment.count_dead_letters()["unloadable"]
        with connect(site.url) as conn:
            refuse(conn, "fhir_partitions.resource_patient", "true", mark("check violation"), "23514")
        add(server, population.patient("one-more"))
        assert pipeline.ingest(DAY, **source) != 0
        with connect(site.url) as conn:
            for table in ("fhir.patient_name", "fhir_partitions.resource_patient"):
                conn.execute(f"DROP TRIGGER refuse ON {table}".encode())

        # A second server that refuses with an echo: deliveries, uploads, the connector
        for status in (422, 500):
            echo.status = status
            pipeline.ingest(DAY, **source, FHIR_DELIVERY_URL=echo.url)
        (tmp_path / "input").mkdir()
        (tmp_path / "input" / "Patient.ndjson").write_bytes(b"\n".join([resources[0], *population.unreadable()]))
        for status in (422, 500):
            echo.status = status
            assert (
                pipeline.run(
                    "upload",
                    "--input",
                    str(tmp_path / "input"),
                    "--failures",
                    str(tmp_path / "failures"),
                    FHIR_BASE_URL=echo.url,
                )
                != 0
            )
        run_refused_connector(pipeline, echo, canaries)

        # The landing zone
        zone = LandingZone(deployment.settings.fhir_landing_url)
        zone.put(
            f"{mark('the name of a file')}.ndjson",
            b"\n".join([population.patient("landed"), *population.invalid("p0"), *population.unreadable()]),
        )
        zone.put(
            f"{mark('the name of a file')}.json",
            b'{"resourceType":"Bundle","type":"batch","entry":[{"resource":' + resources[0],
        )
        zone.put(f"{mark('the name of a file')}.ndjson.gz", gzip.compress(b"\n".join(resources))[:-200])
        zone.put(f"{mark('the name of a file')}.json", resources[0][:100])
        zone.put(f"{mark('the name of a file')}.csv", build_visits(canaries))
        zone.put(
            f"{mark('the name of a file')}.csv",
            f'{mark("a column")},mrn\n{mark("a cell")},"{mark("an mrn")}\n'.encode(),
        )
        zone.put(
            f"{mark('the name of a file')}.json",
            json.dumps({"entry": [mark("an entry")], "resourceType": mark("a type")}).encode(),
        )
        assert pipeline.run("landing", "load") in (0, 1, 75, 78)
        listed = pipeline.show("landing", "list", "--json")
        assert sum(f["name"].startswith(canaries.stem) for f in json.loads(listed)) == 7, "shown to those with the keys"

        # Commands of an operator
        dead_letter_ids = [
            n for (n,) in deployment.query("SELECT id FROM ops.dead_letters WHERE stage = 'validate' LIMIT 2")
        ]
        patch = tmp_path / "patch.json"
        patch.write_text(json.dumps([{"op": "replace", "path": f"/{mark('a path')}", "value": mark("a value")}]))
        assert pipeline.run("dead-letters", "edit", str(dead_letter_ids[0]), "--patch", str(patch)) != 0
        patch.write_bytes(population.patient("another", gender=mark("a gender")))
        assert pipeline.run("dead-letters", "edit", str(dead_letter_ids[0]), "--resource", str(patch)) != 0
        pipeline.run("dead-letters", "show", str(dead_letter_ids[0]))
        pipeline.run("dead-letters", "list", "--json")
        pipeline.run("dead-letters", "replay", "--all", **source)
        pipeline.run("runs", "list")

        # Requests to the API
        send_refused_requests(pipeline, serve, population, canaries)

        # Actions whose audit records cannot be stored
        zone.put(f"{mark('the name of a file')}.ndjson", population.patient("landed-later"))
        tick(deployment)
        tick(deployment)
        with connect(site.url) as conn:
            for table in ("ops.audit_log", "ops.received", "ops.dead_letters"):
                refuse(conn, table, "true", mark(f"an error at {table}"), "23514")
        for command in (
            ("patient", "show", "p0"),
            ("dead-letters", "show", str(dead_letter_ids[1]), "--resource"),
            ("export", "Patient", "--normalized", "--output", str(tmp_path / "export")),
            ("landing", "load"),
            ("upload", "--input", str(tmp_path / "input"), "--failures", str(tmp_path / "failures")),
        ):
            assert pipeline.run(*command, FHIR_BASE_URL=echo.url) != 0
        assert not receive(deployment).success
        with connect(site.url) as conn:
            for table in ("ops.audit_log", "ops.received", "ops.dead_letters"):
                conn.execute(f"DROP TRIGGER refuse ON {table}".encode())

        # Checks, alerts and metrics
        checks = definitions(deployment.settings).resolve_job_def(CHECK_TABLES)
        checks.execute_in_process(instance=deployment.instance, raise_on_error=False)
        alarmed = deployment.settings.model_copy(update={"alert_webhook_url": SecretStr(hook.url)})
        AlertsSensor(Deployment(alarmed, deployment.instance)).tick()
        assert hook.messages
        site.alerts.extend(hook.messages)
        site.metrics.append(render_database_metrics(deployment))

    (site.output / "this process").write_text("".join(capfd.readouterr()))
    assert find_leaks(site, canaries) == set()


def render_database_metrics(deployment: Deployment) -> str:
    with register_database_metrics(deployment.settings, lambda: connect(deployment.url)):
        return render_metrics()[0].decode()


def run_refused_connector(pipeline: Pipeline, echo: EchoServer, canaries: Canaries) -> None:
    """Deliver rows that the server refuses, and one without a valid identifier."""
    mark = canaries.text
    with connect(pipeline.site.url) as conn:
        outbox.install(conn)
        for n in range(3):
            conn.execute(
                "INSERT INTO health.patient (identifier_system, identifier_value, name_family, name_given, gender,"
                " birth_date, phone_number, address_line) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                [
                    MRN if n else None,
                    mark("health.patient.identifier"),
                    mark("health.patient.family"),
                    mark("health.patient.given"),
                    "female" if n < 2 else mark("health.patient.gender"),
                    canaries.day("health.patient.birth_date"),
                    mark("health.patient.phone"),
                    mark("health.patient.address"),
                ],
            )
    for status in (500, 422):
        echo.status = status
        before = len(echo.received)
        process = pipeline.start("connector", "run", FHIR_BASE_URL=echo.url, METRICS_PORT="0")
        deadline = time.monotonic() + 60
        while len(echo.received) < before + 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.terminate()
        process.wait(60)
        assert len(echo.received) > before
    pipeline.run("connector", "dlq", "list", FHIR_BASE_URL=echo.url)


COLUMNS = ("mrn", "first_name", "last_name", "birth_date", "visit_account_number", "visit_date", "reason")


def build_visits(canaries: Canaries) -> bytes:
    """Return visits as CSV: some valid, some with missing cells."""
    rows = [[canaries.text(f"{column} of a visit") for column in COLUMNS] for _ in range(4)]
    for row in rows[:3]:
        row[3], row[5] = canaries.day("birth_date of a visit"), "2024-01-05"
    rows[2][0] = ""
    return "\n".join(",".join(row) for row in [list(COLUMNS), *rows]).encode() + b"\n"


def send_refused_requests(pipeline: Pipeline, serve: Serve, population: Population, canaries: Canaries) -> None:
    """Send requests that are refused, and requests during a database error."""
    mark = canaries.text
    settings = pipeline.deployment.settings
    assert settings.phi_encryption_keys
    api = serve(
        phi_encryption_keys=settings.phi_encryption_keys.get_secret_value(),
        fhir_resource_types=TYPES + ",Consent",
        fhir_last_updated_gte="2024-01-01",
        fhir_store_url=settings.store_url,
        log_level="DEBUG",
    )
    record = {
        "resourceType": "Patient",
        "mrn": [mark("mrn")],
        "name": {"first": 1, "last": mark("last"), mark("a field"): 1},
        "birthDate": mark("birthDate"),
        "gender": mark("gender"),
        "ssn": mark("ssn"),
    }
    head, *rows = [line.split(",") for line in build_visits(canaries).decode().splitlines()]
    visits = [dict(zip(head, row, strict=True)) for row in rows]
    posts: list[tuple[str, Any, dict[str, str]]] = [
        ("/ingest", json.dumps(visits[2:]), {}),
        ("/ingest", json.dumps([{**visits[0], mark("a field"): mark("a value")}, mark("a record")]), {}),
        ("/ingest", json.dumps(visits)[:-9], {}),
        ("/ingest", json.dumps({mark("a member"): visits}), {}),
        ("/api/v1/ingest", json.dumps({"records": [record]}), {}),
        ("/api/v1/ingest", json.dumps({"records": [json.loads(b) for b in population.invalid("p0")]}), {}),
        ("/api/v1/ingest", json.dumps({"records": mark("records")}), {}),
        ("/api/v1/ingest", json.dumps({mark("a member"): []}), {}),
        ("/api/v1/ingest", population.patient("x")[:-20], {"Idempotency-Key": mark("a key")}),
        ("/fhir", population.patient("x", gender=mark("gender")), {}),
        ("/fhir", population.patient("x")[:-20], {}),
        ("/fhir", json.dumps({"resourceType": mark("a type")}), {}),
        ("/fhir", json.dumps({"resourceType": "Bundle", "type": mark("type"), "entry": [mark("entry")]}), {}),
        (f"/ingest/{mark('a resource type in a path')}", b"", {}),
        (f"/{mark('a path')}", b"", {}),
    ]
    answers = [api.post(path, data=body, headers=headers) for path, body, headers in posts]
    before = {path.name for path in Path(api.settings.fhir_landing_url).iterdir()}
    posted = api.post("/ingest", json=visits)
    assert posted.status_code == 202
    for path in Path(api.settings.fhir_landing_url).iterdir():
        if path.name not in before:
            pipeline.site.answers += [path.name.encode(), path.read_bytes()]
    answers += [
        api.get(f"/ingest/tasks/{mark('a task')}"),
        api.get(f"/ingest/tasks/{posted.json()['task_id']}x"),
        api.get(f"/patients?last_name={mark('searched for')}&page={mark('page')}"),
        api.get(f"/patients?last_name={mark('searched for')}"),
        api.get(f"/patients/{mark('an id')}"),
        api.get(f"/runs/{mark('a run')}"),
        api.get("/runs/none", headers={"X-Request-ID": f"{mark('a request id')} of somebody"}),
    ]
    with connect(pipeline.site.url) as conn:
        refuse(conn, "ops.received", "true", mark("API's database error"), "23514")
        refuse(conn, "ops.audit_log", "true", mark("audit's database error"), "23514")
    answers += [
        api.post("/fhir", data=population.patient("posted")),
        api.post("/api/v1/ingest", data=json.dumps({"records": [json.loads(population.patient("posted"))]})),
        api.get(f"/patients?last_name={mark('searched for')}"),
    ]
    assert [answer.status_code for answer in answers[-3:]] == [500, 500, 500]
    with connect(pipeline.site.url) as conn:
        conn.execute("DROP TRIGGER refuse ON ops.received; DROP TRIGGER refuse ON ops.audit_log")
    assert sum(answer.status_code >= 400 for answer in answers) == len(answers) - 1
    for answer in answers:
        headers = {name: value for name, value in answer.headers.items() if name.lower() != "x-request-id"}
        pipeline.site.answers += [answer.content, json.dumps(headers).encode()]
    (pipeline.site.output / "api.log").write_bytes(api.log.read_bytes())
