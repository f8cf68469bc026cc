"""Execution of jobs in the calling process, for the command line. It needs no daemon and no webserver.

Each run loads a range of consecutive windows. Dagster's instance records it like any other run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import inf
from uuid import uuid4

import dagster as dg
import psycopg

from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.extension import extend_idle_types
from fhir_assets.deployment.source import open_source
from fhir_assets.deployment.sources import build_binding
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError, ViewError
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import View
from fhir_assets.orchestration import replayable_windows
from fhir_assets.orchestration.checks.unreconciled_windows import find_unreconciled_windows
from fhir_assets.orchestration.command_runs import execute_command_run
from fhir_assets.orchestration.dead_runs import fail_dead_runs
from fhir_assets.orchestration.failures import EXIT_CODE
from fhir_assets.orchestration.jobs import (
    CHECK_TABLES,
    FETCH_MISSING_REFERENCES,
    INCREMENTAL_LOAD,
    LOAD_RECEIVED,
    REPLAY_DEAD_LETTERS,
)
from fhir_assets.orchestration.received_windows import (
    ReceivedWindows,
    group_windows,
    select_all_layers,
    select_assets,
    select_own_checks,
)
from fhir_assets.orchestration.run_requests import range_tags
from fhir_assets.orchestration.tags import REFRESH_TAG, REPLAY_TAG
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.pipeline.due_windows import (
    DueWindows,
    begin_checkpoints,
    find_due_windows,
    find_extent,
    group_consecutive_windows,
    split_into_runs,
)
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.type_failures import TypeFailures
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import received, replays
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.windows import Interval, WindowRange

Listener = Callable[[dg.EventLogEntry], None]
"""Called with each event of a run."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one run."""

    run_id: str
    windows: WindowRange
    success: bool
    exit_code: int = 0
    """0 if the run succeeded; 78 or 75 if settings, or a later attempt, resolve all of its failures; otherwise 1."""


class Ingestion:
    """Finds windows that are due, received or to be replayed, and executes the jobs that load them.

    ``find_due``, ``find_received``, ``fetch_missing_references`` and ``replay`` first mark dead runs as failed.
    """

    def __init__(self, settings: Settings, definitions: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self._settings = settings
        self._definitions = definitions
        self._instance = instance
        self._warehouse = Warehouse(settings)
        self._binding = build_binding(settings, self._warehouse)

    def find_due(
        self,
        *,
        first: datetime | None = None,
        last: datetime | None = None,
        all_windows: bool = False,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> DueWindows:
        """Return the windows to load, in ranges for one run each.

        Without arguments these are the windows from the checkpoints to now. With ``first`` or ``last`` they are the
        windows from ``first`` (default: the source's oldest resource) to ``last`` (default: now). With ``all_windows``
        they begin at the source's oldest resource. ``on_progress`` receives the progress of a bulk export, which may be
        requested to find the oldest resource. Raises the source's errors, DatabaseUnavailable, and ConfigurationError
        if the loaded state belongs to other settings.
        """
        self._binding.require(fetches=True)
        now = datetime.now(UTC)
        scheme = self._settings.window_scheme
        source = open_source(self._settings, warehouse=self._warehouse, on_progress=on_progress)
        with self._warehouse.connect() as conn:
            fail_dead_runs(self._instance, conn)
            if first is None and last is None and not all_windows:
                return find_due_windows(
                    conn, source, self._settings.fhir_resource_types, scheme, now=now, overlap=self._settings.overlap
                )
        extent = self._find_extent(source) if first is None or last is None else None
        if first is None:
            first = now if extent is None else extent.start or scheme.start
        last = last or (extent.end if extent and source.compute_state() is not None else now)
        return DueWindows(tuple(split_into_runs(scheme, scheme.between(first, min(last, now)))))

    def _find_extent(self, source: Source) -> Interval | None:
        """Return the extent of the offered types, without those that the source refuses: their steps will fail."""
        offered = source.list_types()
        types = [name for name in self._settings.fhir_resource_types if offered is None or name in offered]
        failures = TypeFailures()
        extent = find_extent(source, types, failures)
        if len(failures) == len(types):
            failures.raise_collected()
        return extent

    def create_tables(self) -> None:
        """Create the tables of the views that do not exist, so that they exist even if the source cannot be read.

        A view whose table cannot be created is reported by the step that loads it.
        """
        types = self._settings.fhir_resource_types
        views = [view for view in build_views(self._settings).views if view.resource_type in types]
        with (
            self._warehouse.connect() as conn,
            suppress(ViewError, ConfigurationError, psycopg.Error),
            conn.transaction(),
        ):
            view_tables.ensure_tables(conn, views)
            view_tables.refresh_marts(conn)

    def begin_checkpoints(self, due: DueWindows) -> None:
        """Begin the checkpoints of the resource types that are loaded for the first time."""
        with self._warehouse.connect() as conn:
            begin_checkpoints(conn, due)

    def find_types_not_offered(self) -> list[str]:
        """Return the resource types of the settings that the source does not offer; loads skip them."""
        offered = open_source(self._settings, warehouse=self._warehouse).list_types()
        return [] if offered is None else [t for t in self._settings.fhir_resource_types if t not in offered]

    def count_steps(self) -> int:
        """Return the number of steps in a run of ``incremental_load``."""
        return len(self._definitions.resolve_job_def(INCREMENTAL_LOAD).all_node_defs)

    def extend(self, due: DueWindows) -> list[str]:
        """Extend the due windows to which the source has added nothing, without a run. Return the other resource types.

        Windows that do not fit into one run are not extended.
        """
        settings = self._settings
        if len(due) != 1 or due.new_types:
            return list(settings.fhir_resource_types) if due else []
        return extend_idle_types(
            settings,
            open_source(settings, warehouse=self._warehouse),
            build_store(settings),
            self._warehouse,
            build_views(settings),
            due.ranges[0],
            now=datetime.now(UTC),
            seconds=inf,
            verified=True,
        )

    def load(
        self,
        windows: WindowRange,
        *,
        refresh: Refresh,
        triggered_by: str,
        listener: Listener | None = None,
        resource_types: Sequence[str] | None = None,
    ) -> Outcome:
        """Load the windows in one run of ``incremental_load``. ``listener`` is called with its events.

        ``resource_types`` are the types to load; by default all.
        """
        assets = None
        if resource_types is not None and len(resource_types) < len(self._settings.fhir_resource_types):
            assets = select_all_layers(self._definitions.resolve_asset_graph(), resource_types)
        return self._run(INCREMENTAL_LOAD, windows, refresh, triggered_by, listener, assets)

    def find_received(self, *, origin: str | None = None) -> list[ReceivedWindows]:
        """Return the windows with received resources that are not loaded yet: all, or those of one ``origin``."""
        with self._warehouse.connect() as conn:
            fail_dead_runs(self._instance, conn)
            return group_windows(self._settings, received.find_pending(conn, origin=origin))

    def load_received(
        self, waiting: ReceivedWindows, *, triggered_by: str, listener: Listener | None = None
    ) -> Outcome:
        """Load the received resources of the windows in one run of ``load_received``."""
        with self._warehouse.connect() as conn:
            received.record_request(conn, waiting.pending, now=datetime.now(UTC))
        assets = select_assets(self._definitions.resolve_asset_graph(), waiting.resource_types)
        return self._run(LOAD_RECEIVED, waiting.windows, Refresh.MISSING, triggered_by, listener, assets)

    def fetch_missing_references(self, *, triggered_by: str) -> str | None:
        """Read the missing resources to which loaded resources refer, in one run.

        Return the reason if the run failed; the types that the source did not refuse are read nevertheless.
        ``find_received`` then returns the windows of the resources that the source returned.
        """
        with self._warehouse.connect() as conn:
            fail_dead_runs(self._instance, conn)
        run_id = str(uuid4())
        with self._warehouse.hold_run(run_id):
            events = execute_command_run(
                self._instance,
                self._definitions,
                FETCH_MISSING_REFERENCES,
                run_id=run_id,
                triggered_by=triggered_by,
            )
        return None if self._has_succeeded(run_id) else _describe_failure(events)

    def replay(self, selection: Selection, *, triggered_by: str) -> list[Outcome]:
        """Replay the open dead letters of a selection, in one run for each range of consecutive windows.

        Dead letters of types and windows that the settings do not include stay open.
        """
        with self._warehouse.connect() as conn:
            fail_dead_runs(self._instance, conn)
            scope = replayable_windows.find_replayable(conn, self._settings, selection)
        by_key: dict[str, set[str]] = {}
        for window in scope:
            by_key.setdefault(window.partition_key, set()).add(window.resource_type)
        graph = self._definitions.resolve_asset_graph()
        outcomes = []
        for windows in group_consecutive_windows(self._settings.window_scheme, by_key):
            keys = [window.key for window in windows.windows]
            types = sorted(set().union(*(by_key[key] for key in keys)))
            outcomes.append(
                self._run(
                    REPLAY_DEAD_LETTERS,
                    windows,
                    Refresh.MISSING,
                    triggered_by,
                    None,
                    select_assets(graph, types),
                    claim=replace(selection, partition_keys=keys),
                )
            )
        return outcomes

    @contextmanager
    def _claimed(self, run_id: str, selection: Selection | None) -> Iterator[None]:
        """Claim the selected dead letters for a run during the block, then release those that are still unresolved."""
        if selection is None:
            yield
            return
        with self._warehouse.connect() as conn:
            replays.request_replay(conn, selection, claimed_by=run_id)
        try:
            yield
        finally:
            with self._warehouse.connect() as conn:
                replays.release_claims(conn, run_id)

    def find_unreconciled_windows(self) -> list[tuple[str, WindowCounts]]:
        """Return the windows that do not reconcile, with their resource type, no matter which run evaluated them."""
        settings = self._settings
        with self._warehouse.connect() as conn:
            return find_unreconciled_windows(
                self._instance,
                conn,
                build_store(settings),
                build_views(settings).views,
                settings.fhir_resource_types,
            )

    def check_tables(self, *, triggered_by: str) -> bool:
        """Evaluate the checks of all tables in one run. Return whether the run succeeded; checks may have failed."""
        run_id = str(uuid4())
        with self._warehouse.hold_run(run_id):
            execute_command_run(
                self._instance, self._definitions, CHECK_TABLES, run_id=run_id, triggered_by=triggered_by
            )
        return self._has_succeeded(run_id)

    def apply_consent(self, views: Sequence[View], *, actor: str) -> None:
        """Withhold or release resources in the tables according to the current consents, without a run."""
        step = ConsentStep(
            self._warehouse.connect, views, build_consent_gate(self._settings), run_id=actor, actor=actor
        )
        step.run(datetime.now(UTC))

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
        tags = {REFRESH_TAG: refresh.value}
        if claim is not None:
            tags[REPLAY_TAG] = "marked"
        single = len(windows.windows) == 1
        run_id = str(uuid4())
        if listener:
            self._instance.add_event_listener(run_id, listener)
        checks = [] if assets is None else select_own_checks(self._definitions.resolve_asset_graph(), assets)
        with self._warehouse.hold_run(run_id), self._claimed(run_id, claim):
            events = execute_command_run(
                self._instance,
                self._definitions,
                job,
                run_id=run_id,
                triggered_by=triggered_by,
                tags=tags if single else {**tags, **range_tags(windows)},
                partition_key=windows.windows[0].key if single else None,
                assets=assets,
                checks=checks,
            )
        success = self._has_succeeded(run_id)
        return Outcome(run_id, windows, success, 0 if success else choose_exit_code(_list_exit_codes(events)))

    def _has_succeeded(self, run_id: str) -> bool:
        run = self._instance.get_run_by_id(run_id)
        return run is not None and run.is_success


def _describe_failure(events: Sequence[dg.DagsterEvent]) -> str:
    """Return the descriptions of the ``dagster.Failure`` of each failed step; they contain no patient data."""
    reasons = [
        event.step_failure_data.user_failure_data.description or "no reason was recorded"
        for event in events
        if event.is_step_failure and event.step_failure_data.user_failure_data
    ]
    return "; ".join(dict.fromkeys(reasons)) or "see the page of the run in the Dagster UI"


def _list_exit_codes(events: Sequence[dg.DagsterEvent]) -> list[int]:
    """Return the exit code of each failed step."""
    failures = [event.step_failure_data.user_failure_data for event in events if event.is_step_failure]
    codes = [failure.metadata.get(EXIT_CODE) for failure in failures if failure]
    return [code.value or 1 if isinstance(code, dg.IntMetadataValue) else 1 for code in codes]


def choose_exit_code(codes: Sequence[int]) -> int:
    """Return the exit code of several failures: theirs if all agree, 1 if not or if there is none."""
    return codes[0] if len(set(codes)) == 1 else 1


def select_failed(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of runs that failed."""
    return [outcome for outcome in outcomes if not outcome.success]
