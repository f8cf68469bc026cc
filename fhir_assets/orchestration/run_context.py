"""What an asset needs to know of the Dagster run it is part of."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from traceback import extract_tb
from typing import Literal

import dagster as dg
import psycopg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import DatabaseUnavailable, FhirAssetsError
from fhir_assets.orchestration.tags import PRIORITY_TAG, REFRESH_TAG, REPLAY_TAG, TRIGGER_TAG, USER_TAG
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.warehouse.ops import runs
from fhir_assets.windows import WindowRange, WindowScheme

_log = logging.getLogger(__name__)

_REPLAYS: dict[str, Literal["marked", "open"]] = {"marked": "marked", "open": "open"}
_TRIGGERS = ("dagster/schedule_name", "dagster/sensor_name", "dagster/backfill")


@dataclass(frozen=True, slots=True)
class RunContext:
    """The run's id, its windows, how much it does again, who asked for it, the time it counts as now, and which dead
    letters it replays: None if it is no replay.
    """

    run_id: str
    windows: WindowRange
    refresh: Refresh
    triggered_by: str
    now: datetime
    replay: Literal["marked", "open"] | None = None

    @property
    def partition_keys(self) -> list[str]:
        """The keys of the run's windows, in order."""
        return [window.key for window in self.windows.windows]

    @classmethod
    def of(cls, context: dg.AssetExecutionContext, scheme: WindowScheme) -> "RunContext":
        """Read them from the context: one partition or a range alike."""
        tags = context.run.tags
        named = (f"{tag.removeprefix('dagster/')}:{tags[tag]}" for tag in _TRIGGERS if tag in tags)
        windows = [scheme.window(key) for key in context.partition_keys]
        return cls(
            context.run.run_id,
            WindowRange(windows, from_first=windows[0] == scheme.window_at(scheme.start)),
            Refresh(tags.get(REFRESH_TAG, Refresh.WINDOW)),
            tags.get(TRIGGER_TAG) or next(named, None) or tags.get(USER_TAG) or "manual",
            datetime.now(UTC),
            _REPLAYS.get(tags.get(REPLAY_TAG, "")),
        )


@contextmanager
def recorded(facts: RunContext, warehouse: Warehouse, resource_types: list[str]) -> Iterator[None]:
    """Keep ``ops.ingestion_runs`` true while a step works: RUNNING, then SUCCESS or FAILED with the reason.

    A step yields its outputs inside, so that what the IO manager does counts too. Every error becomes a
    dagster.Failure with one sentence: an error of the project its own, any other its type and place only, for its
    message may quote what it choked on.
    """
    with warehouse.connect() as conn:
        runs.start(
            conn, facts.run_id, resource_types, facts.partition_keys, triggered_by=facts.triggered_by, at=facts.now
        )
    started = perf_counter()
    about = {
        "run": facts.run_id,
        "types": resource_types,
        "window": facts.partition_keys[0],
        "windows": len(facts.partition_keys),
    }
    try:
        yield
    except BaseException as error:
        said = _reason(error)
        _log.error("a step failed", extra={**about, "reason": said})
        # Without a database nothing can be noted: the next load finds the dead run by its lock.
        with suppress(DatabaseUnavailable), warehouse.connect() as conn:
            runs.fail(conn, facts.run_id, resource_types, facts.partition_keys, error=said)
        if isinstance(error, Exception):
            raise dg.Failure(said, allow_retries=False) from None
        raise
    with warehouse.connect() as conn:
        seconds = (perf_counter() - started) / len(resource_types)
        runs.finish(conn, facts.run_id, resource_types, facts.partition_keys, seconds=seconds)
    _log.info("a step is done", extra={**about, "seconds": round(perf_counter() - started, 3)})


def step_tags(resource_types: Sequence[str]) -> dict[str, str]:
    """Tags of a step. Consents come first of all types: then the others are loaded, or withheld, by what they say, and
    do not have to be moved afterwards.
    """
    return {PRIORITY_TAG: "1"} if "Consent" in resource_types else {}


@contextmanager
def sanitized_errors() -> Iterator[None]:
    """Every error of a step or a sensor that keeps no account of runs becomes one sentence, as in ``recorded``: what
    Dagster keeps of an error, its message and those of its causes, may quote what it choked on.
    """
    try:
        yield
    except dg.Failure:
        raise
    except Exception as error:
        raise dg.Failure(_reason(error), allow_retries=False) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, FhirAssetsError):
        return str(error)
    if isinstance(error, GeneratorExit):
        return "the step's output could not be stored: the run's page in the UI says why"
    place = extract_tb(error.__traceback__)[-1]
    state = f", SQLSTATE {error.sqlstate}" if isinstance(error, psycopg.Error) else ""
    return f"unexpected {type(error).__name__}{state} in {Path(place.filename).name}, line {place.lineno}"
