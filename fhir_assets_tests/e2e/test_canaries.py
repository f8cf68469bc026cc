"""Nothing leaks: canaries go the whole road while all fails that can, and turn up nowhere but in what is sealed."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
from fhir_assets_tests.support.content import add
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.echoing_server import Parrot, parrot
from fhir_assets_tests.support.landing import LandingZone, definitions, receive, tick
from fhir_assets_tests.support.leak_scan import PLACES, Site

DAY = datetime(2024, 1, 5, tzinfo=UTC)
TYPES = "Patient,Practitioner,Encounter,Observation,DocumentReference,DiagnosticReport,Coverage"
MRN = "http://hospital.example.org/ids"


def leaks(site: Site, canaries: Canaries, *places: str) -> set[tuple[str, str, str]]:
    """Where markers are that should be nowhere: the place, where exactly, and the element."""
    return {
        (name, where, element)
        for name in places or PLACES
        for where, content in PLACES[name](site)
        for element in canaries.found_in(content)
    }


@pytest.fixture
def canaries() -> Canaries:
    return Canaries()


@pytest.fixture
def serve(database: str, tmp_path: Path) -> Iterator[Serve]:
    with api_processes(database, tmp_path) as start:
        yield start


def site_of(deployment: Deployment, folder: Path) -> Site:
    for name in ("temporary", "output"):
        (folder / name).mkdir()
    home = Path(os.environ["FHIR_ASSETS_TEST_HOME"])
    return Site(
        deployment.url,
        deployment.settings.home,
        folder / "temporary",
        folder / "output",
        (home / "postgres").resolve() / "server.log",
    )


# A leak put in by hand, in each kind of place


def into_a_table(table: str, **values: object) -> Callable[[Site, str], None]:
    def plant(site: Site, marker: str) -> None:
        columns = ", ".join(values)
        given = [value.replace("MARKER", marker) if isinstance(value, str) else value for value in values.values()]
        with connect(site.url) as conn:
            statement = f"INSERT INTO {table} ({columns}) VALUES ({', '.join(['%s'] * len(given))})"
            conn.execute(statement.encode(), given)

    return plant


def into_a_file(name: str, pack: Callable[[bytes], bytes] = bytes) -> Callable[[Site, str], None]:
    def plant(site: Site, marker: str) -> None:
        path = site.home.parent / name.replace("MARKER", marker)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(f'{{"name": "{marker}"}}\n'.encode()))

    return plant


def into_the_server_log(site: Site, marker: str) -> None:
    with connect(site.url) as conn:
        conn.execute(f"DO $$ BEGIN RAISE LOG '%', '{marker}'; END $$".encode())


PLANTS: dict[str, list[Callable[[Site, str], None]]] = {
    "Dagster's database": [
        into_a_table("public.kvs", key="a", value="MARKER"),
        into_a_table("public.daemon_heartbeats", daemon_type="a", daemon_id="MARKER", timestamp="2024-01-01"),
    ],
    "Dagster's home and compute logs": [into_a_file("home/dagster/storage/run/compute_logs/step.err")],
    "operations": [
        into_a_table(
            "ops.ingestion_runs", run_id="r", resource_type="t", partition_key="k", status="FAILED", error="MARKER"
        ),
        into_a_table("ops.incidents", kind="run", name="MARKER", partitions=["k"]),
    ],
    "tables": [
        into_a_table(
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
        into_a_table(
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
    "statistics of the planner": [into_a_table("ops.incidents", kind="run", name="MARKER", partitions=["k"])],
    "store and spool": [
        into_a_file("home/store/.spool/part-1.ndjson.gz", gzip.compress),
        into_a_file("home/store/raw/patient/2024/part-MARKER.ndjson.gz", gzip.compress),
    ],
    "other files": [into_a_file("home/uploads/journal.sqlite", lambda content: b"SQLite\0" + content)],
    "temporary files": [into_a_file("temporary/tmpabc")],
    "logs and error output": [
        into_a_file("output/api.log"),
        into_a_file("output/traceback", lambda content: content.hex().encode()),
        into_a_file("output/header", lambda content: __import__("base64").b64encode(b"x" + content)),
    ],
    "log of Postgres": [into_the_server_log],
    "metrics": [lambda site, marker: site.metrics.append(f'fhir_dead_letters{{rule="{marker}"}} 1')],
    "alerts": [lambda site, marker: site.alerts.append({"text": f"Run of {marker} failed"})],
    "answers to callers": [lambda site, marker: site.answers.append(f'{{"detail": "no {marker}"}}'.encode())],
}
"""By place, how a marker gets there."""


def test_the_scan_finds_a_planted_marker_in_every_location(deploy: Deploy, tmp_path: Path, canaries: Canaries) -> None:
    deployment = deploy()
    with connect(deployment.url) as conn:
        outbox.install(conn)
    site = site_of(deployment, tmp_path)
    assert PLANTS.keys() == PLACES.keys(), "a kind of place where nobody has shown that a leak is found"
    assert leaks(site, canaries) == set()
    for place, plants in PLANTS.items():
        for number, plant in enumerate(plants):
            element = f"planted in {place} ({number})"
            plant(site, canaries.text(element))
            found = {element for _, _, element in leaks(site, canaries, place)}
            assert element in found or any(each.startswith("something") for each in found), element


@pytest.mark.parametrize(
    "form", ["{0}-{1}-{2}", "{0}/{1}/{2}", "{2}.{1}.{0}", "{1}/{2}/{0}", "datetime.date({0}, {1}, {2})"]
)
def test_the_scan_finds_a_date_in_every_format(canaries: Canaries, form: str) -> None:
    year, month, day = canaries.day("Patient.birthDate").split("-")
    assert canaries.found_in(f"born {form.format(year, month, day)}, it says".encode()) == {"Patient.birthDate"}
    assert canaries.found_in(f"{year}-01-01 and {year}-12-{day}".encode()) == set()


# The whole road


class Road:
    """A deployment with keys; every process's output is kept."""

    def __init__(self, deployment: Deployment, site: Site) -> None:
        self.deployment = deployment
        self.site = site
        self._number = 0

    def environment(self, **changed: str) -> dict[str, str]:
        settings = self.deployment.settings
        keys = settings.phi_encryption_keys
        assert keys
        kept = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
        return {
            **kept,
            **self.deployment.environment(),
            "PHI_ENCRYPTION_KEYS": keys.get_secret_value(),
            "PHI_REQUIRED": "1",
            "FHIR_VIEWS": str(settings.fhir_views),
            "FHIR_MAX_ATTEMPTS": "1",
            "FHIR_LANDING_URL": settings.fhir_landing_url,
            "LOG_LEVEL": "DEBUG",
            "TMPDIR": str(self.site.temporary),
            **changed,
        }

    def start(self, *arguments: str, **changed: str) -> "subprocess.Popen[bytes]":
        """`fhir-assets` as a process of its own."""
        self._number += 1
        name = "-".join(each for each in arguments[:2] if each.isalpha())
        with (self.site.output / f"{self._number:02}-{name}").open("wb") as output:
            return subprocess.Popen(
                [str(Path(sys.executable).with_name("fhir-assets")), *arguments],
                env=self.environment(**changed),
                stdout=output,
                stderr=output,
                cwd=self.site.home,
                start_new_session=True,
            )

    def run(self, *arguments: str, **changed: str) -> int:
        """… to its end."""
        return self.start(*arguments, **changed).wait(180)

    def ingest(self, day: datetime, **changed: str) -> int:
        return self.run("ingest", "--from", f"{day:%Y-%m-%d}", "--to", f"{day:%Y-%m-%d}", **changed)

    def killed(self, day: datetime, **changed: str) -> None:
        """A load that is killed in the middle of writing rows."""
        with connect(self.site.url, autocommit=True) as conn:
            conn.execute(
                "CREATE FUNCTION public.wait() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM pg_sleep(60); RETURN NEW; END $$;"
                "CREATE TRIGGER wait BEFORE INSERT ON fhir.patient_name FOR EACH ROW EXECUTE FUNCTION public.wait()"
            )
            process = self.start("ingest", "--from", f"{day:%Y-%m-%d}", "--to", f"{day:%Y-%m-%d}", **changed)
            asleep = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
            while not conn.execute(asleep).fetchone():
                assert process.poll() is None
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            conn.execute(f"SELECT pg_terminate_backend(pid) FROM ({asleep}) asleep".encode())
            conn.execute("DROP FUNCTION public.wait CASCADE")


@pytest.fixture
def road(deploy: Deploy, tmp_path: Path) -> Road:
    views = tmp_path / "views"
    views.mkdir()
    for name, select in BRITTLE.items():
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
    return Road(deployment, site_of(deployment, tmp_path))


BRITTLE = {
    # A second name is one value too many.
    "one_name": {"name": "old", "path": "name.where(use = 'old').family", "type": "string"},
    # Of a type that the text is not.
    "number": {
        "name": "rank",
        "path": "extension.where(url = 'http://x.org/rank').value.ofType(string)",
        "type": "integer",
    },
}
"""Views that some canaries do not fit: they would hold what is not sealed, if anything came through."""


def refuse(conn: Any, table: str, condition: str, marker: str, sqlstate: str) -> None:
    """From now on the database refuses such rows, and quotes them and a marker in all parts of its error."""
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
    road: Road, serve: Serve, tmp_path: Path, canaries: Canaries, capfd: pytest.CaptureFixture[str]
) -> None:
    site, deployment, mark = road.site, road.deployment, canaries.text
    population = Population(canaries, DAY + timedelta(hours=8))
    whole = [body for n in range(3) for body in population.everything(f"p{n}")]

    with SandboxServer(whole) as server, receive_webhooks() as hook, parrot() as echo:
        source = {"FHIR_BASE_URL": server.url}
        # What is good, what validation refuses, and what the views cannot take
        rank = [{"url": "http://x.org/rank", "valueString": mark("an extension")}]
        twice = [{"use": "old", "family": mark("an old name")}, {"use": "old", "family": mark("another")}]
        add(
            server,
            *population.invalid("p0"),
            population.patient("two-names", name=twice),
            population.patient("no-number", extension=rank),
        )
        assert road.ingest(DAY, **source) == 0
        assert road.deployment.loaded()["Patient"] >= 3
        assert len(deployment.dead()) >= 5

        # A server that fails, and quotes what it has; a page that is no JSON
        echo.says = b'{"resourceType":"Bundle","type":"searchset","entry":[{"resource":' + whole[0]
        for status in (500, 422, 200):
            echo.status = status
            assert road.ingest(DAY + timedelta(days=1), FHIR_BASE_URL=echo.url) == 1
        echo.says = None
        server.set_faults(Fault(kind=FaultKind.TRUNCATE, on=frozenset({RequestKind.SEARCH})))
        assert road.ingest(DAY + timedelta(days=1), **source) == 1
        server.set_faults()

        # A process that dies
        for n in range(100):
            add(server, population.patient(f"many{n}"))
        road.killed(DAY, **source)

        # A database that refuses rows: those of a view, and the whole load
        with connect(site.url) as conn:
            refuse(conn, "fhir.patient_name", "true", mark("data error"), "22000")
        assert road.ingest(DAY, **source) == 0
        assert deployment.dead()["unloadable"]
        with connect(site.url) as conn:
            refuse(conn, "fhir.resource_patient", "true", mark("check violation"), "23514")
        add(server, population.patient("one-more"))
        assert road.ingest(DAY, **source) == 1
        with connect(site.url) as conn:
            conn.execute("DROP TRIGGER refuse ON fhir.patient_name; DROP TRIGGER refuse ON fhir.resource_patient")

        # A second server that refuses with an echo: deliveries, uploads, the connector
        for status in (422, 500):
            echo.status = status
            road.ingest(DAY, **source, FHIR_DELIVERY_URL=echo.url)
        (tmp_path / "input").mkdir()
        (tmp_path / "input" / "Patient.ndjson").write_bytes(b"\n".join([whole[0], *population.unreadable()]))
        for status in (422, 500):
            echo.status = status
            assert (
                road.run(
                    "upload",
                    "--input",
                    str(tmp_path / "input"),
                    "--failures",
                    str(tmp_path / "failures"),
                    FHIR_BASE_URL=echo.url,
                )
                == 1
            )
        connector_refused(road, echo, canaries)

        # The landing zone
        zone = LandingZone(deployment.settings.fhir_landing_url)
        zone.put(
            "good.ndjson",
            b"\n".join([population.patient("landed"), *population.invalid("p0"), *population.unreadable()]),
        )
        zone.put("cut.json", b'{"resourceType":"Bundle","type":"batch","entry":[{"resource":' + whole[0])
        zone.put("cut.ndjson.gz", gzip.compress(b"\n".join(whole))[:-200])
        zone.put("no.json", whole[0][:100])
        zone.put("visits.csv", visits_of(canaries))
        zone.put("others.csv", f'{mark("a column")},mrn\n{mark("a cell")},"{mark("an mrn")}\n'.encode())
        zone.put("list.json", json.dumps({"entry": [mark("an entry")], "resourceType": mark("a type")}).encode())
        assert road.run("landing", "load") in (0, 1)
        road.run("landing", "list")

        # By hand
        letters = [n for (n,) in deployment.query("SELECT id FROM ops.dead_letters WHERE stage = 'validate' LIMIT 2")]
        patch = tmp_path / "patch.json"
        patch.write_text(json.dumps([{"op": "replace", "path": f"/{mark('a path')}", "value": mark("a value")}]))
        assert road.run("dead-letters", "edit", str(letters[0]), "--patch", str(patch)) == 1
        patch.write_bytes(population.patient("another", gender=mark("a gender")))
        assert road.run("dead-letters", "edit", str(letters[0]), "--resource", str(patch)) == 1
        road.run("dead-letters", "show", str(letters[0]))
        road.run("dead-letters", "list", "--json")
        road.run("dead-letters", "replay", "--all", **source)
        road.run("runs", "list")

        # Callers of the API
        api_refuses(road, serve, population, canaries)

        # Deeds that cannot be put on record, by hand and in runs of their own
        zone.put("more.ndjson", population.patient("landed-later"))
        tick(deployment)
        tick(deployment)
        with connect(site.url) as conn:
            for table in ("ops.audit_log", "ops.received", "ops.dead_letters"):
                refuse(conn, table, "true", mark(f"an error at {table}"), "23514")
        for command in (
            ("patient", "show", "p0"),
            ("dead-letters", "show", str(letters[1]), "--resource"),
            ("export", "Patient", "--normalized", "--output", str(tmp_path / "export")),
            ("landing", "load"),
            ("upload", "--input", str(tmp_path / "input"), "--failures", str(tmp_path / "failures")),
        ):
            assert road.run(*command, FHIR_BASE_URL=echo.url) != 0
        assert not receive(deployment).success
        with connect(site.url) as conn:
            for table in ("ops.audit_log", "ops.received", "ops.dead_letters"):
                conn.execute(f"DROP TRIGGER refuse ON {table}".encode())

        # Who watches
        checks = definitions(deployment.settings).resolve_job_def(CHECK_TABLES)
        checks.execute_in_process(instance=deployment.instance, raise_on_error=False)
        alarmed = deployment.settings.model_copy(update={"alert_webhook_url": SecretStr(hook.url)})
        AlertsSensor(Deployment(alarmed, deployment.instance)).tick()
        assert hook.messages
        site.alerts.extend(hook.messages)
        site.metrics.append(metrics_of(deployment))

    (site.output / "this process").write_text("".join(capfd.readouterr()))
    found = leaks(site, canaries)
    assert found == set()


def metrics_of(deployment: Deployment) -> str:
    with register_database_metrics(deployment.settings, lambda: connect(deployment.url)):
        return render_metrics()[0].decode()


def connector_refused(road: Road, echo: Parrot, canaries: Canaries) -> None:
    """Rows of the hospital that the server refuses, and one that makes no resource."""
    mark = canaries.text
    with connect(road.site.url) as conn:
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
        before = len(echo.heard)
        process = road.start("connector", "run", FHIR_BASE_URL=echo.url, METRICS_PORT="0")
        deadline = time.monotonic() + 60
        while len(echo.heard) < before + 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.terminate()
        process.wait(60)
        assert len(echo.heard) > before
    road.run("connector", "dlq", "list", FHIR_BASE_URL=echo.url)


COLUMNS = ("mrn", "first_name", "last_name", "birth_date", "visit_account_number", "visit_date", "reason")


def visits_of(canaries: Canaries) -> bytes:
    """Visits as CSV: some good, some without what they need."""
    rows = [[canaries.text(f"{column} of a visit") for column in COLUMNS] for _ in range(4)]
    for row in rows[:3]:
        row[3], row[5] = canaries.day("birth_date of a visit"), "2024-01-05"
    rows[2][0] = ""
    return "\n".join(",".join(row) for row in [list(COLUMNS), *rows]).encode() + b"\n"


def api_refuses(road: Road, serve: Serve, population: Population, canaries: Canaries) -> None:
    """Requests that are refused, and one that breaks the service."""
    mark = canaries.text
    keys = road.deployment.settings.phi_encryption_keys
    assert keys
    api = serve(phi_encryption_keys=keys.get_secret_value(), fhir_resource_types=TYPES + ",Consent", log_level="DEBUG")
    record = {
        "resourceType": "Patient",
        "mrn": [mark("mrn")],
        "name": {"first": 1, "last": mark("last"), mark("a field"): 1},
        "birthDate": mark("birthDate"),
        "gender": mark("gender"),
        "ssn": mark("ssn"),
    }
    head, *rows = [line.split(",") for line in visits_of(canaries).decode().splitlines()]
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
            road.site.answers += [path.name.encode(), path.read_bytes()]
    answers += [
        api.get(f"/ingest/tasks/{mark('a task')}"),
        api.get(f"/ingest/tasks/{posted.json()['task_id']}x"),
        api.get(f"/patients?last_name={mark('searched for')}&page={mark('page')}"),
        api.get(f"/patients?last_name={mark('searched for')}"),
        api.get(f"/patients/{mark('an id')}"),
        api.get(f"/runs/{mark('a run')}"),
        api.get("/runs/none", headers={"X-Request-ID": f"{mark('a request id')} of somebody"}),
    ]
    with connect(road.site.url) as conn:
        refuse(conn, "ops.received", "true", mark("API's database error"), "23514")
        refuse(conn, "ops.audit_log", "true", mark("audit's database error"), "23514")
    answers += [
        api.post("/fhir", data=population.patient("posted")),
        api.post("/api/v1/ingest", data=json.dumps({"records": [json.loads(population.patient("posted"))]})),
        api.get(f"/patients?last_name={mark('searched for')}"),
    ]
    assert all(answer.status_code >= 500 for answer in answers[-3:])
    with connect(road.site.url) as conn:
        conn.execute("DROP TRIGGER refuse ON ops.received; DROP TRIGGER refuse ON ops.audit_log")
    assert sum(answer.status_code >= 400 for answer in answers) == len(answers) - 3
    for answer in answers:
        headers = {name: value for name, value in answer.headers.items() if name.lower() != "x-request-id"}
        road.site.answers += [answer.content, json.dumps(headers).encode()]
    (road.site.output / "api.log").write_bytes(api.log.read_bytes())
