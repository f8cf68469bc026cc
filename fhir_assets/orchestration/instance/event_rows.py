"""Dagster's events as rows of the table ``event_logs``.

Dagster derives the event's values for each column separately; ``build_rows`` derives them once for each event.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache

import dagster as dg
from orjson import dumps

from fhir_assets.orchestration.dagster_internals import (
    AssetMaterializationPlannedData,
    AssetObservationData,
    StepMaterializationData,
)
from fhir_assets.orchestration.instance.event_json import pack_events

_PLACEHOLDER = "the partition key of this row"
_PLACEHOLDER_TEXT = dumps(_PLACEHOLDER).decode()


@dataclass(slots=True)
class Row:
    """A row of ``event_logs`` and the event in it."""

    event: dg.EventLogEntry
    text: str
    """The event as JSON."""
    event_type: dg.DagsterEventType | None
    timestamp: datetime
    """UTC, without a time zone, as in the table."""
    step_key: str | None
    asset_key: str | None
    partition: str | None
    id: int = 0
    """The id that the table assigns on insertion."""

    @property
    def run_id(self) -> str:
        """The id of the event's run."""
        return self.event.run_id

    @property
    def dagster_event_type(self) -> str | None:
        """The name of the event type, or None for a log message."""
        return self.event_type.value if self.event_type else None

    @property
    def tags(self) -> Mapping[str, str]:
        """The tags of a materialization or an observation; empty for other events."""
        match self.event.dagster_event and self.event.dagster_event.event_specific_data:
            case StepMaterializationData() as data:
                return data.materialization.tags or {}
            case AssetObservationData() as data:
                return data.asset_observation.tags or {}
        return {}


def build_rows(events: Sequence[dg.EventLogEntry]) -> list[Row]:
    """Return the rows of events, without ids, in order.

    An event that plans the materialization of many partitions becomes one row for each partition.
    """
    rows: list[Row] = []
    planned = [_planned_partitions(event) for event in events]
    templates = [
        with_partition(event, _PLACEHOLDER) if keys else event for event, keys in zip(events, planned, strict=True)
    ]
    for event, text, keys in zip(templates, pack_events(templates), planned, strict=True):
        row = _build_row(event, text)
        if not keys:
            rows.append(row)
            continue
        head, tail = text.split(_PLACEHOLDER_TEXT)
        rows += [replace(row, text=f"{head}{dumps(key).decode()}{tail}", partition=key) for key in keys]
    return rows


def split_partitions(event: dg.EventLogEntry) -> list[dg.EventLogEntry]:
    """Return one event for each partition that an event plans to materialize, or only the event if it plans none."""
    keys = _planned_partitions(event)
    return [with_partition(event, key) for key in keys] if keys else [event]


def with_partition(event: dg.EventLogEntry, partition_key: str) -> dg.EventLogEntry:
    """Return an event that plans a materialization, reduced to a single partition."""
    dagster_event = event.get_dagster_event()
    planned = AssetMaterializationPlannedData(dagster_event.asset_materialization_planned_data.asset_key, partition_key)
    return event._replace(dagster_event=dagster_event._replace(event_specific_data=planned))


def _planned_partitions(event: dg.EventLogEntry) -> list[str]:
    """Return the partitions that an event plans to materialize if it plans several; otherwise an empty list."""
    match event.dagster_event and event.dagster_event.event_specific_data:
        case AssetMaterializationPlannedData(partitions_subset=subset) if subset:
            return list(subset.get_partition_keys())
    return []


def _build_row(event: dg.EventLogEntry, text: str) -> Row:
    dagster_event = event.dagster_event
    asset, partition = _find_asset_and_partition(dagster_event) if dagster_event else (None, None)
    return Row(
        event,
        text,
        dagster_event.event_type if dagster_event else None,
        datetime.fromtimestamp(event.timestamp, UTC).replace(tzinfo=None),
        dagster_event.step_key if dagster_event else event.step_key,
        key_text(asset) if asset else None,
        partition or None,
    )


def _find_asset_and_partition(event: dg.DagsterEvent) -> tuple[dg.AssetKey | None, str | None]:
    # Check the two most frequent types first, because the properties of the event check all types in turn.
    match event.event_specific_data:
        case StepMaterializationData() as data:
            return data.materialization.asset_key, data.materialization.partition
        case AssetMaterializationPlannedData() as data:
            return data.asset_key, data.partition
    return event.asset_key, event.partition


@lru_cache(maxsize=4096)
def key_text(key: dg.AssetKey) -> str:
    """Return an asset key as Dagster's tables store it."""
    return key.to_string()
