"""Runs on Celery workers, with Redis, an S3 server and two `fhir-assets worker` processes, one of which is killed."""

import base64
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import boto3
import dagster as dg
import pytest
import requests
from redis import Redis, RedisError
from sqlalchemy.exc import OperationalError

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration import dead_runs
from fhir_assets.orchestration.dagster_internals import LaunchRunContext
from fhir_assets.orchestration.instance import celery_launcher, lost_messages
from fhir_assets.orchestration.instance.celery_launcher import QUEUE, build_app
from fhir_assets.orchestration.instance.config import render_dagster_yaml
from fhir_assets.orchestration.jobs import INCREMENTAL_LOAD
from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxProcess, SandboxServer
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.dagster_internals import ReconstructableRepository, add_backfill, monitor_started_run
from fhir_assets_tests.support.databases import database_unavailable
from fhir_assets_tests.support.deployment import SHARED, Deploy, Deployment
from fhir_assets_tests.support.deployment_daemon import END, NEVER, START, daemon, environment

pytestmark = pytest.mark.slow

WINDOWS = 30
WINDOWS_PER_RUN = 5
ALLOWED = 1
"""FHIR_MAX_CONNECTIONS, which is lower than the number of workers."""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """Start a Redis for the test and yield its URL."""
    port = find_free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()


@pytest.fixture
def bucket() -> Iterator[tuple[str, dict[str, str]]]:
    """Start an S3 server in a process of its own. Yield the URL of a bucket and the environment that boto3 needs."""
    port = find_free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        wait_until(lambda: responds(variables["AWS_ENDPOINT_URL"]), seconds=60)
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="store")
        yield "s3://store/fhir", variables
        process.terminate()


def responds(url: str) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(url, timeout=10).ok
    return False


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Resources of Synthea if the shared data is present, otherwise those of a small hospital."""
    if (SHARED / "synthea").exists():
        return SHARED / "synthea"
    write_population(tmp_path / "population", Population(30, 11, 0.02, start=START, end=END.replace(day=30)))
    return tmp_path / "population"


@contextmanager
def worker(deployment: Deployment, log: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `fhir-assets worker` in a process of its own during the block."""
    code = "from fhir_assets.cli import main; main()"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "worker"], env=env, cwd=deployment.settings.home, stdout=output, stderr=output
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_two_workers_of_which_one_is_killed_load_the_same_tables_as_one_process(
    deploy: Deploy, tmp_path: Path, empty_database: str, redis: str, bucket: tuple[str, dict[str, str]], data: Path
) -> None:
    with SandboxProcess(data) as server:
        types = sorted(server.stats()["resources"])
        settings = {
            "fhir_base_url": server.url,
            "fhir_last_updated_gte": "2024-01-01",
            "fhir_resource_types": ",".join(types),
            "fhir_windows_per_run": WINDOWS_PER_RUN,
        }
        clean = deploy(home="clean", url=empty_database, **settings)
        last = START + timedelta(days=WINDOWS - 1)
        assert all(outcome.success for outcome in clean.ingest(first=START, last=last))
        wanted = sum(clean.count_loaded().values())
        assert wanted > 1500

        server.reset_stats()
        server.set_faults(Fault(kind=FaultKind.SLOW, seconds=0.02))
        spread = deploy(fhir_executor="celery", celery_broker_url=redis, **settings)
        home = spread.settings.home / "dagster" / "dagster.yaml"
        home.write_text(
            render_dagster_yaml(spread.settings).replace("poll_interval_seconds: 30", "poll_interval_seconds: 5")
        )
        url, of_bucket = bucket
        changed = {
            **of_bucket,
            "FHIR_EXECUTOR": "celery",
            "CELERY_BROKER_URL": redis,
            "FHIR_STORE_URL": url,
            "FHIR_SCHEDULE": NEVER,
            "FHIR_MAX_CONNECTIONS": str(ALLOWED),
            "FHIR_WINDOWS_PER_RUN": str(WINDOWS_PER_RUN),
        }
        env = environment(spread, **changed)
        ask_for_a_backfill(spread)
        with (
            daemon(spread, tmp_path / "daemon.log", **changed),
            worker(spread, tmp_path / "one.log", env) as one,
            worker(spread, tmp_path / "two.log", env),
        ):
            both = "SELECT count(DISTINCT run_id) FROM ops.ingestion_runs WHERE status = 'RUNNING'"
            half = "SELECT count(*) FROM fhir.resource"
            wait_until(lambda: spread.query(half)[0][0] >= wanted // 2, seconds=900)
            while spread.query(both)[0][0] < 2:
                time.sleep(0.02)
            one.send_signal(signal.SIGKILL)
            assert spread.query(half)[0][0] < wanted
            wait_until(lambda: is_finished(spread, len(types)), seconds=900)
        stats = server.stats()
    assert stats["max_in_flight"] == ALLOWED
    assert spread.tables() == clean.tables()
    assert spread.count_dead_letters() == clean.count_dead_letters()
    # The sensor of table checks starts runs of its own.
    backfill = dg.RunsFilter(tags={"dagster/backfill": "story"})
    ended = [run.status for run in spread.instance.get_runs(backfill)]
    assert ended.count(dg.DagsterRunStatus.SUCCESS) == WINDOWS // WINDOWS_PER_RUN
    assert ended.count(dg.DagsterRunStatus.FAILURE) == 1 == len(ended) - WINDOWS // WINDOWS_PER_RUN
    assert not list((spread.settings.home / "store").rglob("*.gz"))


def ask_for_a_backfill(deployment: Deployment) -> None:
    """Store a backfill of all windows of the three layers."""
    days = [f"{START + timedelta(days=n):%Y-%m-%d}" for n in range(WINDOWS)]
    add_backfill(deployment.instance, build_definitions(deployment.settings), days, backfill_id="story")


def launch(deployment: Deployment, day: str) -> str:
    """Launch a run as the daemon does when the run is first in its queue. Return its id."""
    job = build_definitions(deployment.settings).resolve_job_def(INCREMENTAL_LOAD)
    origin = ReconstructableRepository.for_module("fhir_assets.definitions", "defs")
    run = deployment.instance.create_run_for_job(
        job,
        status=dg.DagsterRunStatus.STARTING,
        tags={"dagster/partition": day},
        job_code_origin=origin.get_reconstructable_job(INCREMENTAL_LOAD).get_python_origin(),
    )
    deployment.instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    return run.run_id


@pytest.fixture
def slow_server(deploy: Deploy, redis: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    """A deployment with workers and a slow FHIR server."""
    monkeypatch.setenv("CELERY_BROKER_URL", redis)
    people = [patient(f"p{n}", START + timedelta(days=n)) for n in range(3)]
    with SandboxServer(people, faults=(Fault(kind=FaultKind.SLOW, seconds=2),)) as server:
        deployment = deploy(
            fhir_executor="celery",
            celery_broker_url=redis,
            fhir_base_url=server.url,
            fhir_resource_types="Patient,Encounter",
            fhir_last_updated_gte="2024-01-01",
        )
        folder = deployment.settings.home / "dagster"
        (folder / "dagster.yaml").write_text(render_dagster_yaml(deployment.settings))
        with dg.DagsterInstance.from_config(str(folder)) as instance:
            yield Deployment(deployment.settings, instance)


def has_rows_of_run(deployment: Deployment, run_id: str) -> bool:
    return deployment.query("SELECT FROM ops.ingestion_runs WHERE run_id = %s", run_id) != []


def status(deployment: Deployment, run_id: str) -> dg.DagsterRunStatus:
    run = deployment.instance.get_run_by_id(run_id)
    assert run
    return run.status


def test_a_terminated_worker_finishes_its_run_and_leaves_the_next_run_to_others(
    slow_server: Deployment, tmp_path: Path
) -> None:
    env = environment(slow_server, FHIR_EXECUTOR="celery")
    first, second = launch(slow_server, "2024-01-01"), launch(slow_server, "2024-01-02")
    with worker(slow_server, tmp_path / "one.log", env) as one:
        wait_until(lambda: has_rows_of_run(slow_server, first), seconds=300)
        one.terminate()
        assert one.wait(300) == 0
    assert status(slow_server, first) is dg.DagsterRunStatus.SUCCESS
    assert status(slow_server, second) is dg.DagsterRunStatus.STARTING
    with worker(slow_server, tmp_path / "two.log", env):
        wait_until(lambda: status(slow_server, second) is dg.DagsterRunStatus.SUCCESS, seconds=300)
    assert slow_server.count_loaded() == {"Patient": 2}


def test_a_worker_outlives_an_outage_of_postgres_during_a_run_and_takes_the_next(
    slow_server: Deployment, tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_runs, "GRACE", timedelta(0))
    env = environment(slow_server, FHIR_EXECUTOR="celery")
    first, second = launch(slow_server, "2024-01-01"), launch(slow_server, "2024-01-02")
    with worker(slow_server, tmp_path / "one.log", env) as process:
        wait_until(lambda: has_rows_of_run(slow_server, first), seconds=300)
        with database_unavailable(postgres, slow_server.url):
            time.sleep(8)  # Longer than the interval of the worker's check for a cancellation.
            assert process.poll() is None
        wait_until(lambda: is_over(slow_server, first), seconds=300)
        wait_until(lambda: status(slow_server, second) is dg.DagsterRunStatus.SUCCESS, seconds=300)
        assert process.poll() is None
    log = (tmp_path / "one.log").read_text()
    assert "raised unexpected" not in log
    assert log.count("received") == 2


def test_a_message_that_arrives_during_an_outage_of_postgres_waits_for_its_end(
    slow_server: Deployment, tmp_path: Path, postgres: str
) -> None:
    run_id = launch(slow_server, "2024-01-01")
    log, env = tmp_path / "one.log", environment(slow_server, FHIR_EXECUTOR="celery")
    with ExitStack() as running:
        with database_unavailable(postgres, slow_server.url):
            running.enter_context(worker(slow_server, log, env))
            wait_until(lambda: "waiting for the database" in log.read_text(), seconds=120)
        wait_until(lambda: is_over(slow_server, run_id), seconds=300)
    assert status(slow_server, run_id) is dg.DagsterRunStatus.SUCCESS


def is_over(deployment: Deployment, run_id: str) -> bool:
    """Look for dead runs as the daemon does, and return whether a run is finished."""
    # The connections that the outage has ended fail once.
    with suppress(OperationalError), Warehouse(deployment.settings).connect() as conn:
        dead_runs.fail_dead_runs(deployment.instance, conn)
        run = deployment.instance.get_run_by_id(run_id)
        return run is not None and run.is_finished
    return False


def test_a_worker_ends_a_cancelled_run_and_takes_the_next(slow_server: Deployment, tmp_path: Path) -> None:
    env = environment(slow_server, FHIR_EXECUTOR="celery")
    first, second = launch(slow_server, "2024-01-01"), launch(slow_server, "2024-01-02")
    with worker(slow_server, tmp_path / "one.log", env):
        wait_until(lambda: has_rows_of_run(slow_server, first), seconds=300)
        run = slow_server.instance.get_run_by_id(first)
        assert run
        slow_server.instance.report_run_canceling(run)
        wait_until(lambda: status(slow_server, first) is dg.DagsterRunStatus.CANCELED, seconds=300)
        wait_until(lambda: status(slow_server, second) is dg.DagsterRunStatus.SUCCESS, seconds=300)
    assert slow_server.count_loaded() == {"Patient": 1}


def names_run(message: str, run_id: str) -> bool:
    return run_id.encode() in base64.b64decode(json.loads(message)["body"])


def test_a_run_whose_message_the_broker_lost_is_sent_again_once(
    slow_server: Deployment, tmp_path: Path, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_runs, "GRACE", timedelta(0))
    app = build_app(slow_server.settings)
    lost, kept = launch(slow_server, "2024-01-01"), launch(slow_server, "2024-01-02")
    client = Redis.from_url(redis, decode_responses=True)
    [message] = [text for text in map(str, client.lrange(QUEUE, 0, -1)) if names_run(text, lost)]
    client.lrem(QUEUE, 1, message)
    assert lost_messages.find_without_message(app, QUEUE, [lost, kept]) == [lost]
    for _ in range(2):
        dead_runs.resend_lost_runs(slow_server.instance)
        assert client.llen(QUEUE) == 2
    client.flushall()
    with worker(slow_server, tmp_path / "one.log", environment(slow_server, FHIR_EXECUTOR="celery")):
        dead_runs.resend_lost_runs(slow_server.instance)
        wait_until(lambda: client.hlen("unacked") == 1, seconds=300)
        assert lost_messages.find_without_message(app, QUEUE, [lost, kept]) == []
        wait_until(lambda: status(slow_server, lost) is dg.DagsterRunStatus.SUCCESS, seconds=300)
        wait_until(lambda: status(slow_server, kept) is dg.DagsterRunStatus.SUCCESS, seconds=300)
    assert slow_server.count_loaded() == {"Patient": 2}
    assert "keeps its messages in memory only" in (tmp_path / "one.log").read_text()
    client.config_set("appendonly", "yes")
    assert lost_messages.keeps_messages(app)


def test_a_run_that_was_sent_twice_is_executed_by_one_worker(slow_server: Deployment, tmp_path: Path) -> None:
    run_id = launch(slow_server, "2024-01-01")
    run = slow_server.instance.get_run_by_id(run_id)
    assert run
    slow_server.instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    env = environment(slow_server, FHIR_EXECUTOR="celery")
    with worker(slow_server, tmp_path / "one.log", env), worker(slow_server, tmp_path / "two.log", env):
        wait_until(lambda: status(slow_server, run_id) is dg.DagsterRunStatus.SUCCESS, seconds=300)
    started = slow_server.instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.RUN_START).records
    assert len(started) == 1


def test_forged_messages_start_nothing_and_stop_no_worker(slow_server: Deployment, tmp_path: Path, redis: str) -> None:
    ours, not_started = launch(slow_server, "2024-01-01"), launch(slow_server, "2024-01-02")
    app, client = build_app(slow_server.settings), Redis.from_url(redis)
    messages = [message for message in client.lrange(QUEUE, 0, -1) if isinstance(message, bytes)]
    [genuine] = [message for message in messages if names_run(message.decode(), ours)]
    [of_other] = [message for message in messages if names_run(message.decode(), not_started)]
    # Nobody has asked for this run: Dagster has not sent it, and the forged message does.
    run = slow_server.instance.get_run_by_id(not_started)
    assert run
    slow_server.instance.delete_run(not_started)
    slow_server.instance.add_run(run.with_status(dg.DagsterRunStatus.NOT_STARTED))
    forged = json.loads(genuine)
    names_nothing = {**forged, "body": base64.b64encode(b'[[], {"execute_job_args_packed": {"a": 1}}, {}]').decode()}
    pickled = {**forged, "content-type": "application/x-python-serialize", "body": base64.b64encode(b"cos\n").decode()}
    client.delete(QUEUE)
    no_messages = [b"no message at all", b"\xff", b"[" * 100_000, b"{}", b"null", b"[1]", b'"text"']
    damaged: list[dict[str, object]] = [{"body": body} for body in ("A", "=", "W10=")]
    damaged += [{"properties": {}}, {"headers": None}, {"headers": []}]
    no_messages += [json.dumps({**forged, **part}).encode() for part in damaged]
    no_messages.append(json.dumps({**forged, "headers": {**forged["headers"], "timelimit": 5}}).encode())
    client.rpush(QUEUE, genuine, json.dumps(names_nothing), of_other, *no_messages, json.dumps(pickled))
    assert lost_messages.find_without_message(app, QUEUE, [ours, not_started]) == []
    log = tmp_path / "one.log"
    with worker(slow_server, log, environment(slow_server, FHIR_EXECUTOR="celery")) as process:
        wait_until(lambda: status(slow_server, ours) is dg.DagsterRunStatus.SUCCESS, seconds=300)
        wait_until(lambda: client.llen(QUEUE) == 0 and client.hlen("unacked") == 0, seconds=300)
        assert process.poll() is None
    assert status(slow_server, not_started) is dg.DagsterRunStatus.NOT_STARTED
    assert slow_server.count_loaded() == {"Patient": 1}
    text = log.read_text()
    assert text.count("is no message and is ignored") == len(no_messages) + 1
    assert "names no run and is ignored" in text
    assert "is not being started, and is ignored" in text
    assert app.conf.worker_enable_remote_control is False
    client.rpush(QUEUE, b"no message at all")
    assert lost_messages.find_without_message(app, QUEUE, [ours]) == [ours]


def test_a_run_whose_worker_is_killed_has_a_reason(
    slow_server: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(celery_launcher, "GRACE", timedelta(0))
    run_id = launch(slow_server, "2024-01-01")
    with worker(slow_server, tmp_path / "one.log", environment(slow_server, FHIR_EXECUTOR="celery")) as process:
        wait_until(lambda: has_rows_of_run(slow_server, run_id), seconds=300)
        process.kill()
        process.wait()
    for name, value in slow_server.environment().items():
        monkeypatch.setenv(name, value)
    while status(slow_server, run_id) is dg.DagsterRunStatus.STARTED:  # Postgres releases the lock a moment later.
        monitor_started_run(slow_server.instance, run_id)
    events = slow_server.instance.all_logs(
        run_id, of_type={dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.STEP_FAILURE}
    )
    messages = {event.dagster_event.message for event in events if event.dagster_event}
    (reason,) = messages
    assert reason
    assert reason.startswith(f"The process of this run (process {process.pid} on ")
    assert "It was not the kernel's out-of-memory killer" in reason


def test_a_run_that_no_worker_can_begin_fails_after_it_was_sent_again_three_times(
    slow_server: Deployment, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_runs, "GRACE", timedelta(0))
    run_id = launch(slow_server, "2024-01-01")
    client = Redis.from_url(redis)
    for _ in range(4):
        assert status(slow_server, run_id) is dg.DagsterRunStatus.STARTING
        client.flushall()
        dead_runs.resend_lost_runs(slow_server.instance)
    assert status(slow_server, run_id) is dg.DagsterRunStatus.FAILURE


def test_a_broker_that_is_down_is_asked_again_later(
    slow_server: Deployment, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_runs, "GRACE", timedelta(0))
    waiting = launch(slow_server, "2024-01-01")
    with suppress(RedisError):
        Redis.from_url(redis).shutdown(nosave=True)
    dead_runs.resend_lost_runs(slow_server.instance)
    assert status(slow_server, waiting) is dg.DagsterRunStatus.STARTING


def is_finished(deployment: Deployment, types: int) -> bool:
    """Return whether every window of every type is loaded and no run is unfinished."""
    done = deployment.query(
        "SELECT count(DISTINCT (resource_type, partition_key)) FROM ops.ingestion_runs"
        " WHERE status = 'SUCCESS' AND loaded IS NOT NULL"
    )
    unfinished = deployment.instance.get_runs_count(dg.RunsFilter(statuses=UNFINISHED))
    return done[0][0] >= WINDOWS * types and unfinished == 0
