"""Loading without the UI: the job in this process, a range of windows a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

import dagster as dg

from fhir_assets.assets.run import REFRESH_TAG, TRIGGER_TAG
from fhir_assets.automation.dead_runs import give_up_dead_runs
from fhir_assets.automation.requests import range_tags
from fhir_assets.pipeline.due import chunks, windows_due
from fhir_assets.pipeline.plan import Refresh
from fhir_assets.resources.source import open_source
from fhir_assets.resources.warehouse import Warehouse
from fhir_assets.settings import Settings
from fhir_assets.windows import WindowRange

Listener = Callable[[dg.EventLogEntry], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One Dagster run of an ingestion."""

    run_id: str
    windows: WindowRange
    success: bool


class Ingestion:
    """Asks what is due and loads it, run by run."""

    def __init__(self, settings: Settings, definitions: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self._settings = settings
        self._definitions = definitions
        self._instance = instance
        self._warehouse = Warehouse(settings)

    def due(
        self, *, first: datetime | None = None, last: datetime | None = None, all_windows: bool = False
    ) -> list[WindowRange]:
        """The windows to load: those between ``first`` and ``last``; else from the checkpoints to now, or with
        ``all_windows`` from the source's oldest resource on.
        """
        now = datetime.now(UTC)
        scheme = self._settings.window_scheme
        source = open_source(self._settings)
        with self._warehouse.connect() as conn:
            give_up_dead_runs(self._instance, conn)
            if first is None and last is None and not all_windows:
                return windows_due(
                    conn, source, self._settings.fhir_resource_types, scheme, now=now, overlap=self._settings.overlap
                )
        extent = source.extent(self._settings.fhir_resource_types) if first is None or last is None else None
        first = first or (extent.start if extent and extent.start else now)
        last = last or (extent.end if extent and source.state() is not None else now)
        return chunks(list(scheme.between(first, min(last, now))))

    def not_offered(self) -> list[str]:
        """The types that are asked for but that the source does not offer; they are skipped."""
        offered = open_source(self._settings).offered()
        return [] if offered is None else [t for t in self._settings.fhir_resource_types if t not in offered]

    def steps(self) -> int:
        """How many steps one run has."""
        return len(self._job().all_node_defs)

    def load(
        self, windows: WindowRange, *, refresh: Refresh, triggered_by: str, listener: Listener | None = None
    ) -> Outcome:
        """Load the windows in one run of ``incremental_load``; ``listener`` hears its events."""
        tags = {REFRESH_TAG: refresh.value, TRIGGER_TAG: triggered_by}
        single = len(windows.windows) == 1
        run_id = str(uuid4())
        if listener:
            self._instance.add_event_listener(run_id, listener)
        with self._warehouse.held_for(run_id):
            result = self._job().execute_in_process(
                instance=self._instance,
                raise_on_error=False,
                partition_key=windows.windows[0].key if single else None,
                tags=tags if single else {**tags, **range_tags(windows)},
                run_id=run_id,
            )
        return Outcome(result.run_id, windows, result.success)

    def _job(self) -> dg.JobDefinition:
        return self._definitions.resolve_job_def("incremental_load")


def failed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The runs that did not end well."""
    return [outcome for outcome in outcomes if not outcome.success]
