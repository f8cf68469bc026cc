"""Loading without the UI: the job in this process, a range of windows a run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import uuid4

import dagster as dg

from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.source import open_source
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.dead_runs import fail_dead_runs
from fhir_assets.orchestration.jobs import (
    FETCH_MISSING_REFERENCES,
    INCREMENTAL_LOAD,
    LOAD_RECEIVED,
    REPLAY_DEAD_LETTERS,
)
from fhir_assets.orchestration.received_windows import ReceivedWindows, group_windows, select_assets
from fhir_assets.orchestration.run_requests import range_tags
from fhir_assets.orchestration.tags import REFRESH_TAG, REPLAY_TAG, TRIGGER_TAG
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.pipeline.due_windows import (
    DueWindows,
    begin_checkpoints,
    find_due_windows,
    group_consecutive_windows,
    split_into_runs,
)
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import received, replays
from fhir_assets.warehouse.ops.dead_letters import Selection
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

    def find_due(
        self, *, first: datetime | None = None, last: datetime | None = None, all_windows: bool = False
    ) -> DueWindows:
        """The windows to load: those between ``first`` and ``last``; else from the checkpoints to now, or with
        ``all_windows`` from the source's oldest resource on.
        """
        now = datetime.now(UTC)
        scheme = self._settings.window_scheme
        source = open_source(self._settings, warehouse=self._warehouse)
        with self._warehouse.connect() as conn:
            fail_dead_runs(self._instance, conn)
            if first is None and last is None and not all_windows:
                return find_due_windows(
                    conn, source, self._settings.fhir_resource_types, scheme, now=now, overlap=self._settings.overlap
                )
        extent = source.extent(self._settings.fhir_resource_types) if first is None or last is None else None
        first = first or (extent.start if extent and extent.start else now)
        last = last or (extent.end if extent and source.state() is not None else now)
        return DueWindows(tuple(split_into_runs(scheme, scheme.between(first, min(last, now)))))

    def begin_checkpoints(self, due: DueWindows) -> None:
        """Begin the checkpoints of the types that are loaded for the first time."""
        with self._warehouse.connect() as conn:
            begin_checkpoints(conn, due)

    def find_types_not_offered(self) -> list[str]:
        """The types that are asked for but that the source does not offer; they are skipped."""
        offered = open_source(self._settings, warehouse=self._warehouse).offered()
        return [] if offered is None else [t for t in self._settings.fhir_resource_types if t not in offered]

    def count_steps(self) -> int:
        """How many steps one run has."""
        return len(self._definitions.resolve_job_def(INCREMENTAL_LOAD).all_node_defs)

    def load(
        self, windows: WindowRange, *, refresh: Refresh, triggered_by: str, listener: Listener | None = None
    ) -> Outcome:
        """Load the windows in one run of ``incremental_load``; ``listener`` hears its events."""
        return self._run(INCREMENTAL_LOAD, windows, refresh, triggered_by, listener)

    def find_received(self, *, origin: str | None = None) -> list[ReceivedWindows]:
        """What was received, by ``origin`` or at all, and is not in the tables yet."""
        with self._warehouse.connect() as conn:
            fail_dead_runs(self._instance, conn)
            return group_windows(self._settings, received.pending(conn, origin=origin))

    def load_received(
        self, waiting: ReceivedWindows, *, triggered_by: str, listener: Listener | None = None
    ) -> Outcome:
        """Load what was received into the windows in one run of ``load_received``."""
        with self._warehouse.connect() as conn:
            received.ask(conn, waiting.pending, now=datetime.now(UTC))
        assets = select_assets(self._definitions.resolve_asset_graph(), waiting.resource_types)
        return self._run(LOAD_RECEIVED, waiting.windows, Refresh.MISSING, triggered_by, listener, assets)

    def fetch_missing_references(self, *, triggered_by: str) -> bool:
        """Ask the source for what loaded resources refer to, in one run. Returns whether it went well; what came waits
        in ``received``.
        """
        with self._warehouse.connect() as conn:
            fail_dead_runs(self._instance, conn)
        run_id = str(uuid4())
        with self._warehouse.hold_run(run_id):
            result = self._definitions.resolve_job_def(FETCH_MISSING_REFERENCES).execute_in_process(
                instance=self._instance, raise_on_error=False, tags={TRIGGER_TAG: triggered_by}, run_id=run_id
            )
        return result.success

    def replay(self, selection: Selection, *, triggered_by: str) -> list[Outcome]:
        """Replay the open dead letters of a selection, in a run of ``replay_dead_letters`` a stretch of windows."""
        with self._warehouse.connect() as conn:
            fail_dead_runs(self._instance, conn)
            scope = replays.scope(conn, selection)
        by_key: dict[str, set[str]] = {}
        for each in scope:
            by_key.setdefault(each.partition_key, set()).add(each.resource_type)
        graph = self._definitions.resolve_asset_graph()
        outcomes = []
        for windows in group_consecutive_windows(self._settings.window_scheme, by_key):
            keys = [window.key for window in windows.windows]
            types = sorted(set().union(*(by_key[key] for key in keys)))
            chosen = replace(selection, partition_keys=keys)
            outcomes.append(
                self._run(
                    REPLAY_DEAD_LETTERS,
                    windows,
                    Refresh.MISSING,
                    triggered_by,
                    None,
                    select_assets(graph, types),
                    claim=chosen,
                )
            )
        return outcomes

    @contextmanager
    def _claimed(self, run_id: str, selection: Selection | None) -> Iterator[None]:
        """The letters of a selection are the run's meanwhile; those it did not come to are open again afterwards."""
        if selection is None:
            yield
            return
        with self._warehouse.connect() as conn:
            replays.mark(conn, selection, claimed_by=run_id)
        try:
            yield
        finally:
            with self._warehouse.connect() as conn:
                replays.release_own(conn, run_id)

    def apply_consent(self, views: Sequence[View], *, actor: str) -> None:
        """Bring the tables to what consent says now, where no run does so."""
        sweep = ConsentStep(
            self._warehouse.connect, views, build_consent_gate(self._settings), run_id=actor, actor=actor
        )
        sweep.run(datetime.now(UTC))

    def _run(
        self,
        job: str,
        windows: WindowRange,
        refresh: Refresh,
        triggered_by: str,
        listener: Listener | None,
        assets: list[dg.AssetKey] | None = None,
        *,
        claim: Selection | None = None,
    ) -> Outcome:
        tags = {REFRESH_TAG: refresh.value, TRIGGER_TAG: triggered_by}
        if claim is not None:
            tags[REPLAY_TAG] = "marked"
        single = len(windows.windows) == 1
        run_id = str(uuid4())
        if listener:
            self._instance.add_event_listener(run_id, listener)
        with self._warehouse.hold_run(run_id), self._claimed(run_id, claim):
            result = self._definitions.resolve_job_def(job).execute_in_process(
                instance=self._instance,
                raise_on_error=False,
                partition_key=windows.windows[0].key if single else None,
                tags=tags if single else {**tags, **range_tags(windows)},
                run_id=run_id,
                asset_selection=assets,
            )
        return Outcome(result.run_id, windows, result.success)


def select_failed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The runs that did not end well."""
    return [outcome for outcome in outcomes if not outcome.success]
