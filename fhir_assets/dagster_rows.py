"""Dagster's events as the rows of its table: what Dagster looks up anew for every column is found once an event."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

import dagster as dg
from dagster._core.events import (
    AssetMaterializationPlannedData,
    AssetObservationData,
    DagsterEvent,
    DagsterEventType,
    StepMaterializationData,
)

from fhir_assets.dagster_texts import texts


@dataclass(slots=True)
class Row:
    """An event as the table has it: ``text`` is all of it, ``id`` what the table gives it."""

    event: dg.EventLogEntry
    text: str
    kind: DagsterEventType | None
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
    """The rows of events, without their ids."""
    return [_row(*each) for each in zip(events, texts(events), strict=True)]


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


def _subject(told: DagsterEvent) -> tuple[dg.AssetKey | None, str | None]:
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
