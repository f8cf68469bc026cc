"""Dagster's events as rows of the table ``event_logs``.

Dagster derives the event's values for each column separately; ``build_rows`` derives them once for each event.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain, groupby
from typing import Any

import dagster as dg
from orjson import dumps

from fhir_assets.orchestration.dagster_internals import (
    AssetMaterializationPlannedData,
    AssetObservationData,
    StepMaterializationData,
)
from fhir_assets.orchestration.instance.event_json import pack_entry, pack_events, pack_metadata

_PLACEHOLDER = "the partition key of this row"
_PLACEHOLDER_TEXT = dumps(_PLACEHOLDER).decode()
_NO_METADATA = '"metadata_entries":[]'


@dataclass(frozen=True, slots=True)
class WindowMaterializations:
    """The materializations of an asset for many partitions: the event of the last, and the metadata of each."""

    event: dg.EventLogEntry
    metadata_by_partition: Mapping[str, Mapping[str, Any]]

    def split(self) -> list[dg.EventLogEntry]:
        """Return one event for each partition."""
        return [
            _with_materialization(self.event, key, metadata) for key, metadata in self.metadata_by_partition.items()
        ]


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


def build_rows(entries: Sequence[dg.EventLogEntry | WindowMaterializations]) -> list[Row]:
    """Return the rows of events, without ids, in order.

    An event that plans the materialization of many partitions becomes one row for each partition.
    """
    rows: list[Row] = []
    for expanded, group in groupby(entries, key=lambda entry: isinstance(entry, WindowMaterializations)):
        if expanded:
            for entry in group:
                assert isinstance(entry, WindowMaterializations)
                rows += _build_materialization_rows(entry)
        else:
            rows += _build_rows([entry for entry in group if not isinstance(entry, WindowMaterializations)])
    return rows


def _build_materialization_rows(entry: WindowMaterializations) -> list[Row]:
    """Return the rows of the materializations, which differ in partition and metadata only."""
    (text,) = pack_events([_with_materialization(entry.event, _PLACEHOLDER, {})])
    row = _build_row(entry.event, text)
    parts = [part.split(_NO_METADATA) for part in text.split(_PLACEHOLDER_TEXT)]
    if sorted(map(len, parts)) != [1, 2]:
        return _build_rows(entry.split())
    first, *middle, last = chain.from_iterable(parts)
    is_partition_first = len(parts[0]) == 1
    try:
        packed = {
            key: f'"metadata_entries":[{_pack_metadata(metadata)}]'
            for key, metadata in entry.metadata_by_partition.items()
        }
    except (TypeError, ValueError):
        return _build_rows(entry.split())  # Values that only Python's json module writes.
    rows = []
    for key, metadata in packed.items():
        values = (dumps(key).decode(), metadata)
        before, after = values if is_partition_first else values[::-1]
        rows.append(replace(row, text=f"{first}{before}{middle[0]}{after}{last}", partition=key))
    return rows


def _pack_metadata(metadata: Mapping[str, Any]) -> str:
    return ",".join(
        pack_entry(label, value) if type(value) in (int, str) else pack_metadata({label: value})
        for label, value in metadata.items()
    )


def _with_materialization(event: dg.EventLogEntry, partition: str, metadata: Mapping[str, Any]) -> dg.EventLogEntry:
    """Return an event of a materialization with another partition and metadata."""
    dagster_event = event.get_dagster_event()
    before = dagster_event.step_materialization_data.materialization
    changed = dg.AssetMaterialization(
        before.asset_key, before.description, metadata=metadata, partition=partition, tags=before.tags
    )
    return event._replace(dagster_event=dagster_event._replace(event_specific_data=StepMaterializationData(changed)))


def _build_rows(events: Sequence[dg.EventLogEntry]) -> list[Row]:
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


def split_partitions(event: dg.EventLogEntry | WindowMaterializations) -> list[dg.EventLogEntry]:
    """Return one event for each partition that an event plans to materialize or materializes; else only the event."""
    if isinstance(event, WindowMaterializations):
        return event.split()
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
