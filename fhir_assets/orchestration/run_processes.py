"""The process that executes a run: recorded as an event of the run, so that others can tell why it ended."""

from dataclasses import asdict
from typing import Any

import dagster as dg

from fhir_assets.orchestration.dagster_internals import EngineEventData
from fhir_assets.process_ends import MemoryKills, ProcessIdentity

_IDENTITY = "process"
"""The metadata of the event with the identity of the process."""

_SEARCHED_EVENTS = 50


def record_process(instance: dg.DagsterInstance, run: dg.DagsterRun, identity: ProcessIdentity) -> None:
    """Add an event to a run that says which process executes it. Each process of a run adds one."""
    data = EngineEventData(metadata={_IDENTITY: dg.MetadataValue.json(asdict(identity))})
    instance.report_engine_event(f"The steps are executed by {identity}.", run, data)


def find_process(instance: dg.DagsterInstance, run_id: str) -> ProcessIdentity | None:
    """Return the process that executed a run, the last one if there were several; None if none has begun."""
    records = instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.ENGINE_EVENT, limit=_SEARCHED_EVENTS, ascending=False
    ).records
    for record in records:
        event = record.event_log_entry.dagster_event
        data = event.event_specific_data if event else None
        if isinstance(data, EngineEventData) and (identity := _read_identity(data)) is not None:
            return identity
    return None


def _read_identity(data: EngineEventData) -> ProcessIdentity | None:
    value = data.metadata.get(_IDENTITY)
    fields: Any = value.value if isinstance(value, dg.JsonMetadataValue) else None
    if not isinstance(fields, dict):
        return None
    try:
        return ProcessIdentity(**{**fields, "kills": MemoryKills(**fields["kills"])})
    except (KeyError, TypeError):  # An event of another version.
        return None
