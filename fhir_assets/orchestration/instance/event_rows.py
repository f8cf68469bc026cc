"""Dagster's events as the rows of its table: what Dagster looks up anew for every column is found once an event."""

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
from fhir_assets.orchestration.instance.event_json import texts

_HOLE = "the partition's place"
_HOLE_TEXT = dumps(_HOLE).decode()


@dataclass(slots=True)
class Row:
    """An event as the table has it: ``text`` is all of it, ``id`` what the table gives it."""

    event: dg.EventLogEntry
    text: str
    kind: dg.DagsterEventType | None
    timestamp: datetime
    step_key: str | None
    asset_key: str | None
    partition: str | None
    id: int = 0

    @property
    def run_id(self) -> str:
        """The event's run."""
        return self.event.run_id

    @property
    def dagster_event_type(self) -> str | None:
        """The name of its kind."""
        return self.kind.value if self.kind else None

    @property
    def tags(self) -> Mapping[str, str]:
        """Those of a materialization or an observation."""
        match self.event.dagster_event and self.event.dagster_event.event_specific_data:
            case StepMaterializationData() as made:
                return made.materialization.tags or {}
            case AssetObservationData() as seen:
                return seen.asset_observation.tags or {}
        return {}


def rows_of(events: Sequence[dg.EventLogEntry]) -> list[Row]:
    """The rows of events, without their ids: one an event, but one a partition of an event that plans many."""
    rows: list[Row] = []
    planned = [_planned(event) for event in events]
    told = [of_partition(event, _HOLE) if keys else event for event, keys in zip(events, planned, strict=True)]
    for event, text, keys in zip(told, texts(told), planned, strict=True):
        row = _row(event, text)
        if not keys:
            rows.append(row)
            continue
        head, tail = text.split(_HOLE_TEXT)
        rows += [replace(row, text=f"{head}{dumps(key).decode()}{tail}", partition=key) for key in keys]
    return rows


def each_partition(event: dg.EventLogEntry) -> list[dg.EventLogEntry]:
    """An event that plans many partitions as one of each; any other by itself."""
    keys = _planned(event)
    return [of_partition(event, key) for key in keys] if keys else [event]


def of_partition(event: dg.EventLogEntry, partition_key: str) -> dg.EventLogEntry:
    """An event that plans a materialization, of a single partition."""
    told = event.get_dagster_event()
    planned = AssetMaterializationPlannedData(told.asset_materialization_planned_data.asset_key, partition_key)
    return event._replace(dagster_event=told._replace(event_specific_data=planned))


def _planned(event: dg.EventLogEntry) -> list[str]:
    """The partitions that an event plans to materialize, if they are many."""
    match event.dagster_event and event.dagster_event.event_specific_data:
        case AssetMaterializationPlannedData(partitions_subset=subset) if subset:
            return list(subset.get_partition_keys())
    return []


def _row(event: dg.EventLogEntry, text: str) -> Row:
    told = event.dagster_event
    asset, partition = _subject(told) if told else (None, None)
    return Row(
        event,
        text,
        told.event_type if told else None,
        datetime.fromtimestamp(event.timestamp, UTC).replace(tzinfo=None),
        told.step_key if told else event.step_key,
        key_text(asset) if asset else None,
        partition or None,
    )


def _subject(told: dg.DagsterEvent) -> tuple[dg.AssetKey | None, str | None]:
    """The asset and the partition that an event is of; of what there is most without a look at all other kinds."""
    match told.event_specific_data:
        case StepMaterializationData() as made:
            return made.materialization.asset_key, made.materialization.partition
        case AssetMaterializationPlannedData() as planned:
            return planned.asset_key, planned.partition
    return told.asset_key, told.partition


@lru_cache(maxsize=4096)
def key_text(key: dg.AssetKey) -> str:
    """An asset's key as Dagster's tables have it."""
    return key.to_string()
