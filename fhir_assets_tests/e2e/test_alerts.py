"""Somebody is told what fails, once, and that it is over: a real webhook, which is down at first."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.delivery.webhook import build_message
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.ops.incidents import Incident
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.content import add, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

DAY = datetime(2024, 1, 5, tzinfo=UTC)
SECRET = "Wintergarten"
NAME = [{"family": SECRET}]


class Receiver:
    """A webhook: what it was told, and the statuses it answers next; 200 when they are used up."""

    def __init__(self, url: str, statuses: list[int]) -> None:
        self.url = url
        self.statuses = statuses
        self.told: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        return json.dumps(self.told, ensure_ascii=False)


@contextmanager
def receiver(*statuses: int) -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = found.statuses.pop(0) if found.statuses else 200
            if status == 200:
                found.told.append(body)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Receiver(f"http://127.0.0.1:{server.server_port}/hook", list(statuses))
        Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


class Watch:
    """The sensor, tick after tick."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._cursor: str | None = None

    def tick(self) -> str:
        repository = build_definitions(self._deployment.settings).get_repository_def()
        with dg.build_sensor_context(
            self._deployment.instance, cursor=self._cursor, repository_def=repository
        ) as context:
            result = repository.get_sensor_def("alerts").evaluate_tick(context)
        self._cursor = result.cursor
        return result.skip_message or ""


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([]) as server:
        for day in range(2):
            moment = DAY + timedelta(days=day)
            add(server, *(patient(f"p{day}-{n}", moment, name=NAME) for n in range(4)))
        yield server


def deployed(deploy: Deploy, server: SandboxServer, hook: Receiver, **settings: object) -> Deployment:
    return deploy(
        fhir_base_url=server.url,
        fhir_last_updated_gte="2024-01-05",
        fhir_resource_types="Patient",
        alert_webhook_url=hook.url,
        dead_letter_error_rate=0.1,
        **settings,
    )


def test_a_failed_check_is_told_once_and_its_end_too(deploy: Deploy, server: SandboxServer) -> None:
    with receiver(503, 503, 503) as hook:
        deployment = deployed(deploy, server, hook)
        watch = Watch(deployment)
        add(server, *(patient(f"bad{n}", DAY, name=NAME, gender="malee") for n in range(3)))
        last = DAY + timedelta(days=1)
        deployment.ingest(first=DAY, last=last)
        assert "did not accept the message" in watch.tick()
        assert hook.told == []
        watch.tick()
        watch.tick()
        assert len(hook.told) == 1
        began = hook.told[0]["began"]
        assert [each["name"] for each in began] == ["normalized/patient:dead_letter_rate"]
        assert began[0]["partitions"] == ["2024-01-05"]
        assert "/assets/normalized/patient" in began[0]["link"]

        add(server, *(patient(f"bad{n}", DAY + timedelta(hours=1), name=NAME) for n in range(3)))
        deployment.ingest(first=DAY, last=last, refresh=Refresh.WINDOW)
        watch.tick()
        watch.tick()
        assert len(hook.told) == 2
        assert hook.told[1]["began"] == []
        assert [each["name"] for each in hook.told[1]["over"]] == ["normalized/patient:dead_letter_rate"]
        assert SECRET not in hook.text


def test_a_failed_run_is_told_and_over_when_the_same_windows_succeed(deploy: Deploy, server: SandboxServer) -> None:
    with receiver() as hook:
        deployment = deployed(deploy, server, hook)
        watch = Watch(deployment)
        broken = deployed(deploy, server, hook, fhir_store_url="/proc/none")
        first, last = DAY, DAY + timedelta(days=1)
        assert not all(outcome.success for outcome in broken.ingest(first=first, last=last))
        watch.tick()
        [told] = hook.told
        assert [(each["kind"], each["name"], each["partition_count"]) for each in told["began"]] == [
            ("run", "incremental_load", 2)
        ]
        deployment.ingest(first=first, last=first)
        watch.tick()
        assert len(hook.told) == 1, "one of the two windows fails still"
        deployment.ingest(first=first, last=last)
        watch.tick()
        assert [each["name"] for each in hook.told[1]["over"]] == ["incremental_load"]


def test_windows_behind_schedule_are_told(deploy: Deploy, server: SandboxServer) -> None:
    with receiver() as hook:
        deployment = deployed(deploy, server, hook)
        with connect(deployment.url) as conn:
            checkpoints.begin(conn, ["Patient"], DAY, source_state=None)
            watch = Watch(deployment)
            watch.tick()
            assert hook.told == [], "it has just begun"
            conn.execute("UPDATE ops.checkpoints SET updated_at = now() - interval '61 minutes'")
            conn.commit()
            watch.tick()
            checkpoints.advance(conn, "Patient", DAY, DAY + timedelta(days=1), "a run")
            conn.commit()
            watch.tick()
            checkpoints.advance(conn, "Patient", DAY, datetime.now(UTC), "a run")
            conn.commit()
            watch.tick()
        told, over = hook.told
        assert [(each["kind"], each["partitions"]) for each in told["began"]] == [("behind", ["Patient"])]
        assert [(each["kind"], each["name"]) for each in over["over"]] == [("behind", "incremental_load")]


def test_what_failed_and_recovered_before_anybody_looked_wakes_nobody(deploy: Deploy, server: SandboxServer) -> None:
    with receiver() as hook:
        deployment = deployed(deploy, server, hook)
        broken = deployed(deploy, server, hook, fhir_store_url="/proc/none")
        broken.ingest(first=DAY, last=DAY)
        deployment.ingest(first=DAY, last=DAY)
        Watch(deployment).tick()
        assert hook.told == []
        assert deployment.query("SELECT name, closed_at IS NOT NULL FROM ops.incidents") == [("incremental_load", True)]


def test_the_message_names_a_few_and_counts_the_rest() -> None:
    now = datetime.now(UTC)
    many = [
        Incident(n, "run", f"job{n}", [f"w{k}" for k in range(30)], {"windows": 30}, "r", now, None, None, None)
        for n in range(40)
    ]
    text = str(build_message(many, [], ui_url="http://ui", card=False)["text"])
    assert "and 20 more" in text
    assert "40 in all" in text
    assert "attachments" in build_message(many, [], ui_url="http://ui", card=True)
