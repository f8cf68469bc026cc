"""Every name that tests import from Dagster's private modules, with its use.

Other tests import them from here, so that an upgrade of Dagster breaks one module of the tests.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import dagster as dg

# The commands that a deployment starts.
from dagster._cli import create_dagster_cli

# Validates a config against a schema, as Dagster validates dagster.yaml.
from dagster._config import process_config as process_config

# The key of a step in an event.
from dagster._core.definitions.dependency import NodeHandle

# The code location of a run, by which a Celery worker finds its job.
from dagster._core.definitions.reconstruct import ReconstructableRepository as ReconstructableRepository

# Schedule or sensor, in the retention settings of an instance.
from dagster._core.definitions.run_request import InstigatorType as InstigatorType

# The result of one evaluation of a schedule.
from dagster._core.definitions.schedule_definition import ScheduleExecutionData as ScheduleExecutionData

# A backfill as the UI stores it for the daemon.
from dagster._core.execution.backfill import BulkActionStatus as BulkActionStatus
from dagster._core.execution.backfill import PartitionBackfill

# The key of a step in an event.
from dagster._core.execution.plan.handle import StepHandle

# The recorded evaluations of a schedule or sensor.
from dagster._core.scheduler.instigation import InstigatorTick as InstigatorTick
from dagster._core.scheduler.instigation import TickStatus as TickStatus

# The status of the evaluation of a check.
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecordStatus as AssetCheckExecutionRecordStatus,
)
from dagster._daemon.cli import create_dagster_daemon_cli

# What Dagster says about a process that ended.
from dagster._utils import get_run_crash_explanation as get_run_crash_explanation
from dagster_webserver.cli import create_dagster_webserver_cli

from fhir_assets.orchestration.jobs import LAYERS


def load_command(program: str) -> Any:
    """Return the click command of one of Dagster's programs. The imports take a second."""
    commands: dict[str, Callable[[], Any]] = {
        "dagster": create_dagster_cli,
        "dagster-daemon": create_dagster_daemon_cli,
        "dagster-webserver": create_dagster_webserver_cli,
    }
    return commands[program]()


def add_backfill(
    instance: dg.DagsterInstance, definitions: dg.Definitions, partition_keys: Sequence[str], *, backfill_id: str
) -> None:
    """Store a backfill of all three layers for the daemon, as *Materialize all* does in the UI."""
    graph = definitions.get_repository_def().asset_graph
    with warnings.catch_warnings():
        # Dagster calls its own deprecated AssetSelection.sources here.
        warnings.simplefilter("ignore", DeprecationWarning)
        backfill = PartitionBackfill.from_asset_partitions(
            backfill_id=backfill_id,
            asset_graph=graph,
            partition_names=partition_keys,
            asset_selection=[key for key in graph.materializable_asset_keys if key.path[0] in LAYERS],
            backfill_timestamp=time.time(),
            tags={},
            dynamic_partitions_store=instance,
            all_partitions=False,
            title=None,
            description=None,
            run_config=None,
        )
    instance.add_backfill(backfill)


@contextmanager
def open_workspace(instance: dg.DagsterInstance) -> Iterator[Any]:
    """Open what the webserver's requests need: the instance, and the code location in this process.

    The imports take a second, so they are inside the function.
    """
    from dagster._core.remote_origin import InProcessCodeLocationOrigin
    from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget

    target = LoadableTargetOrigin(module_name="fhir_assets.definitions", attribute="defs")
    origin = InProcessCodeLocationOrigin(target, location_name="fhir_assets")
    with warnings.catch_warnings():
        # Dagster itself reads deprecated properties of schedules when a code location is in its process.
        warnings.simplefilter("ignore", DeprecationWarning)
        with WorkspaceProcessContext(instance, InProcessWorkspaceLoadTarget(origin)) as context:
            yield context


def record_tick(instance: dg.DagsterInstance, name: str, status: str) -> None:
    """Record a tick of a running sensor that ended with a status, as the daemon does."""
    from dagster._core.remote_origin import (
        InProcessCodeLocationOrigin,
        RemoteInstigatorOrigin,
        RemoteRepositoryOrigin,
    )
    from dagster._core.scheduler.instigation import (
        InstigatorState,
        InstigatorStatus,
        SensorInstigatorData,
        TickData,
    )
    from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
    from dagster_shared.error import SerializableErrorInfo

    location = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="fhir_assets.definitions"))
    origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, "__repository__"), name)
    state = InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.RUNNING, SensorInstigatorData())
    if instance.get_instigator_state(state.instigator_origin_id, state.selector_id) is None:
        instance.add_instigator_state(state)
    instance.create_tick(
        TickData(
            state.instigator_origin_id,
            name,
            InstigatorType.SENSOR,
            TickStatus(status),
            time.time(),
            selector_id=state.selector_id,
            run_ids=["a run"] if status == "SUCCESS" else None,
            error=SerializableErrorInfo("refused", [], None) if status == "FAILURE" else None,
        )
    )


def start_step(instance: dg.DagsterInstance, run: dg.DagsterRun, step: str) -> None:
    """Record that a step has begun, as its process does."""
    started = dg.DagsterEvent(
        dg.DagsterEventType.STEP_START.value, run.job_name, step_handle=StepHandle(NodeHandle(step, None), step)
    )
    instance.report_dagster_event(started, run.run_id)


def monitor_starting_run(instance: dg.DagsterInstance, run_id: str) -> None:
    """Fail a run that has not begun in time, as the daemon does."""
    import logging

    from dagster._daemon.monitoring.run_monitoring import monitor_starting_run

    record = instance.get_run_record_by_id(run_id)
    assert record
    monitor_starting_run(instance, record, logging.getLogger("test"))


def monitor_started_run(instance: dg.DagsterInstance, run_id: str) -> None:
    """Ask the launcher for the worker of a run, and fail the run if it has ended, as the daemon does."""
    import logging

    from dagster._daemon.monitoring.run_monitoring import monitor_started_run

    record = instance.get_run_record_by_id(run_id)
    assert record
    workspace: Any = None  # Only a resumed run needs it.
    monitor_started_run(instance, workspace, record, logging.getLogger("test"))


def describe_pod(pod: Any) -> str:
    """Return what Dagster says about a pod of Kubernetes that failed."""
    from dagster_k8s.client import DagsterKubernetesClient

    cluster = SimpleNamespace(list_namespaced_event=lambda *_, **__: SimpleNamespace(items=[]))
    client = DagsterKubernetesClient(None, cluster, None, None, None)  # type: ignore[no-untyped-call]
    return str(client.get_pod_debug_info("pod", "namespace", pod=pod, include_container_logs=False))
