"""Every name that the project imports from Dagster's private modules, with its use and what breaks without it.

No other module of the package, and no YAML file, may name a private module of Dagster (``dagster._core``,
``dagster._serdes``, …); ``fhir_assets_tests/test_architecture.py`` checks this rule and lists the names below.

Dagster is pinned to an exact version in ``pyproject.toml``. Before you raise it, read this module from top to bottom:
for each name, check whether it still exists, and whether a public name has replaced it.

In addition to these imports, ``instance/storage.py`` and ``instance/celery_launcher.py`` subclass public classes of
dagster-postgres and dagster-celery and use some of their protected members (``_connect``, ``_get_asset_entry_values``,
``_event_log_storage``, ``_instance``), ``window_metadata.py`` sets ``_metadata_accumulator`` of a step,
``window_materializations.py`` sets its ``_plan_data``, and both that module and ``checks/window.py`` call functions of
``dg.DagsterEvent`` that are public but undocumented.
"""

from typing import Any, NamedTuple

import dagster as dg
import sqlalchemy

# The data of the events ASSET_CHECK_EVALUATION_PLANNED, ASSET_MATERIALIZATION_PLANNED, ASSET_OBSERVATION and
# ASSET_MATERIALIZATION. The batched event log (instance/storage.py, instance/event_rows.py) reads asset, partition and
# check from them. Without them: configure dagster-postgres' own storage in dagster.yaml, which writes each event in a
# transaction of its own; a load of an empty window then takes about twice as long.
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationPlanned as AssetCheckEvaluationPlanned,
)

# The materialization that an evaluation of a check is about. checks/window.py sets it for each window of a range, as
# Dagster does for a single partition. Without it: the UI treats these evaluations as outdated, and shows the
# partitions as missing.
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData as AssetCheckEvaluationTargetMaterializationData,
)

# The kind of asset events that an output has; the events of an output; and the tag of a run for whose outputs Dagster
# logs no events. window_materializations.py logs the materializations of all windows of a run as one event, which the
# event log expands. Without them: Dagster logs them one by one, which takes a fifth of the CPU of a load of 91 days.
from dagster._core.definitions.assets.definition.asset_spec import AssetExecutionType as AssetExecutionType

# Type of asset graphs, which `dg.Definitions.resolve_asset_graph` and `dg.RepositoryDefinition.asset_graph` return.
# Used in annotations only. Without it: annotate with Any.
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph as AssetGraph

# A job in the memory of this process, its plan, the snapshot of the plan, and the execution of a stored run of the job.
# command_runs.py stores a run as Dagster stores a launched one, and executes it. Without them:
# `JobDefinition.execute_in_process`, whose runs name no code location: the UI warns before it executes them again.
from dagster._core.definitions.job_base import InMemoryJob as InMemoryJob

# Dagster's serializer of the metadata of an event. instance/event_json.py packs classes that have this field serializer
# or no field serializer; it leaves all other classes to Dagster. Without it: let Dagster serialize each event, which
# takes a third of the time of a run over empty windows.
from dagster._core.definitions.metadata import MetadataFieldSerializer as MetadataFieldSerializer

# Type of the jobs that `dg.define_asset_job` returns. Used in annotations only. Without it: annotate with Any.
from dagster._core.definitions.unresolved_asset_job_definition import (
    UnresolvedAssetJobDefinition as UnresolvedAssetJobDefinition,
)

# The position in the events of a run. See EventLogConnection.
from dagster._core.event_api import EventLogCursor as EventLogCursor

# See AssetCheckEvaluationPlanned.
from dagster._core.events import AssetMaterializationPlannedData as AssetMaterializationPlannedData
from dagster._core.events import AssetObservationData as AssetObservationData

# Marks events as one batch, which Dagster passes to the storage in one call. checks/window.py logs the evaluations of
# all windows of a run in this way. Without it: `context.log_event` for each evaluation, one transaction each.
from dagster._core.events import DagsterEventBatchMetadata as DagsterEventBatchMetadata

# Facts of an engine event and the reason of a failed run. run_processes.py records the process of a run in such an
# event; run_ends.py reads which error or exit code Dagster has recorded, and whether a run did not begin.
# Without them: the reason of a killed run is "marked as failed from outside".
from dagster._core.events import EngineEventData as EngineEventData
from dagster._core.events import JobFailureData as JobFailureData
from dagster._core.events import RunFailureReason as RunFailureReason

# See AssetCheckEvaluationPlanned.
from dagster._core.events import StepMaterializationData as StepMaterializationData

# See InMemoryJob.
from dagster._core.execution.api import create_execution_plan as create_execution_plan
from dagster._core.execution.api import execute_run_iterator as execute_run_iterator

# The metadata that a step has added to its outputs so far; window_metadata.py adds that of all windows at once. Without
# them: `context.add_asset_metadata` for each window, whose time grows with the square of the number of windows.
from dagster._core.execution.context.metadata_logging import AssetMetadataHandle as AssetMetadataHandle
from dagster._core.execution.context.metadata_logging import OutputMetadataAccumulator as OutputMetadataAccumulator

# See AssetExecutionType.
from dagster._core.execution.plan.execute_step import _get_output_asset_events

# The data of STEP_FAILURE. run_ends.py ends the steps of a killed run with them. Without them: the UI shows these steps
# without a reason.
from dagster._core.execution.plan.objects import StepFailureData as StepFailureData
from dagster._core.execution.plan.objects import UserFailureData as UserFailureData

# The defaults of dagster.yaml, which a class that it names as `instance_class` has to return. instance/reasons.py has
# such a class. Without it: leave `instance_class` out of dagster.yaml; runs that were killed then show no reason.
from dagster._core.instance.ref import InstanceRef as InstanceRef

# The result that a run launcher returns when the daemon checks the worker of a run. The Celery launcher returns FAILED
# for a killed worker. Without them: the runs of a killed worker stay STARTED until a person terminates them.
from dagster._core.launcher import CheckRunHealthResult as CheckRunHealthResult

# The argument of a run launcher. The Celery launcher sends a run again whose message is lost. Without it: such a run
# waits until a person terminates it.
from dagster._core.launcher import LaunchRunContext as LaunchRunContext
from dagster._core.launcher import WorkerStatus as WorkerStatus

# The job, repository and code location of a run, by which the UI finds the job. command_runs.py names the code location
# without its address. See InMemoryJob.
from dagster._core.remote_origin import RegisteredCodeLocationOrigin as RegisteredCodeLocationOrigin
from dagster._core.remote_origin import RemoteJobOrigin as RemoteJobOrigin
from dagster._core.remote_origin import RemoteRepositoryOrigin as RemoteRepositoryOrigin

# See InMemoryJob.
from dagster._core.snap import snapshot_from_execution_plan as snapshot_from_execution_plan

# The status of a row of `asset_check_executions`, which the batched event log writes. Without it: the strings PLANNED,
# SUCCEEDED and FAILED.
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecordStatus as AssetCheckExecutionRecordStatus,
)

# Type of the `config` of a Postgres storage in dagster.yaml. Used in annotations only. Without it: annotate with
# Mapping[str, Any].
from dagster._core.storage.config import PostgresStorageConfig as PostgresStorageConfig

# A page of the events of a run, and the position in them. instance/storage.py returns pages without what repeats for
# each window. Without them: the page of a run shows a plan and a materialization for each asset and window.
from dagster._core.storage.event_log.base import EventLogConnection as EventLogConnection

# A compute log manager that discards stdout and stderr of steps. Base class of instance/compute_logs.py. Without it:
# stdout and stderr of steps, which may quote a resource, stay on disk.
from dagster._core.storage.noop_compute_log_manager import NoOpComputeLogManager as NoOpComputeLogManager

# See AssetExecutionType.
from dagster._core.storage.tags import EXTERNALLY_MANAGED_ASSETS_TAG as EXTERNALLY_MANAGED_ASSETS_TAG

# Type of the heartbeat of a daemon, which instance/reasons.py receives. Used in annotations only. Without it: annotate
# with Any.
from dagster._daemon.types import DaemonHeartbeat as DaemonHeartbeat

# The module, class and config of a class that dagster.yaml names. Dagster passes it to `from_config_value` of the
# classes in instance/. Without it: annotate with Any.
from dagster._serdes import ConfigurableClassData as ConfigurableClassData

# See StepFailureData.
from dagster_shared.error import SerializableErrorInfo as SerializableErrorInfo

# Dagster's serializer of the objects of a class, and the registry of all serializable classes. instance/event_json.py
# packs the same fields under the same names. Without them: see MetadataFieldSerializer.
from dagster_shared.serdes.serdes import _WHITELIST_MAP
from dagster_shared.serdes.serdes import ObjectSerializer as ObjectSerializer

SERIALIZABLE_CLASSES = _WHITELIST_MAP
build_output_events = _get_output_asset_events


class EventLogTables(NamedTuple):
    """The tables of Dagster's event log that the batched event log writes in addition to ``event_logs``."""

    check_executions: sqlalchemy.Table
    event_tags: sqlalchemy.Table
    asset_keys: sqlalchemy.Table
    asset_key_index: str
    """Name of the data migration that added the indexed columns of ``asset_keys``."""


def load_event_log_tables() -> EventLogTables:
    """Return the table definitions of Dagster's event log.

    The import is inside the function because it takes 0.2 seconds and only processes with an instance need it. Without
    these tables: see AssetCheckEvaluationPlanned.
    """
    from dagster._core.storage.event_log.migration import ASSET_KEY_INDEX_COLS
    from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable, AssetEventTagsTable, AssetKeyTable

    return EventLogTables(AssetCheckExecutionsTable, AssetEventTagsTable, AssetKeyTable, ASSET_KEY_INDEX_COLS)


def read_run_id(packed_arguments: Any) -> str:
    """Return the run id in a message of dagster-celery's run launcher.

    Without ``ExecuteRunArgs``: read the field ``run_id`` of the message, a JSON object.
    """
    from dagster._grpc.types import ExecuteRunArgs
    from dagster._serdes import unpack_value

    return unpack_value(packed_arguments, as_type=ExecuteRunArgs).run_id


def execute_run(run_id: str, instance: dg.DagsterInstance) -> int:
    """Execute a run in the calling thread and return its exit code: 0 for success.

    The command ``dagster api execute_run`` does the same in a separate process. Without this function: start that
    command for each run, which takes about a second before the first step.
    """
    from dagster._cli.api import _execute_run_command_body

    return _execute_run_command_body(run_id, instance, lambda _: None, set_exit_code_on_failure=True)
