"""Runs on Celery workers, for benchmarks: a Redis, and runs of the due windows, sent as Dagster's daemon sends them."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.definitions import build_definitions
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.orchestration.dagster_internals import LaunchRunContext
from fhir_assets.orchestration.instance import config
from fhir_assets.orchestration.jobs import INCREMENTAL_LOAD
from fhir_assets.orchestration.run_requests import UNFINISHED, range_tags
from fhir_assets.orchestration.tags import PARTITION_TAG
from fhir_assets.settings import Settings
from fhir_assets_tests.support.dagster_internals import ReconstructableRepository


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a Redis that keeps its messages in ``folder``, and yield its URL."""
    port = find_free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--appendonly", "yes"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


def send_first_load(settings: Settings) -> Callable[[], bool]:
    """Send a run for each range of due windows to the workers. Return a function that says whether all have ended."""
    definitions = build_definitions(settings)
    instance = config.open_instance(settings)
    ingestion = Ingestion(settings, definitions, instance)
    due = ingestion.due_loads.find()
    ingestion.due_loads.begin_checkpoints(due)
    repository = ReconstructableRepository.for_module("fhir_assets.definitions", "defs")
    origin = repository.get_reconstructable_job(INCREMENTAL_LOAD).get_python_origin()
    for windows in due:
        single = len(windows.windows) == 1
        run = instance.create_run_for_job(
            definitions.resolve_job_def(INCREMENTAL_LOAD),
            status=dg.DagsterRunStatus.STARTING,
            tags={PARTITION_TAG: windows.windows[0].key} if single else range_tags(windows),
            job_code_origin=origin,
        )
        instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    unfinished = dg.RunsFilter(job_name=INCREMENTAL_LOAD, statuses=UNFINISHED)
    return lambda: instance.get_runs_count(unfinished) == 0
