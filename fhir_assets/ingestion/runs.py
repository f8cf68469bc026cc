"""Execution of jobs in the calling process, for the command line. It needs no daemon and no webserver.

Each run loads a range of consecutive windows. Dagster's instance records it like any other run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

import dagster as dg
import psycopg
import sqlalchemy.exc
from dagster_postgres.utils import DagsterPostgresException

from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.foreign_errors import translate_error
from fhir_assets.ingestion.due_loads import DueLoads
from fhir_assets.ingestion.outcome import LoadListener, Outcome, choose_exit_code
from fhir_assets.ingestion.relay import LoadRequest
from fhir_assets.orchestration import replayable_windows
from fhir_assets.orchestration.checks.unreconciled_windows import find_unreconciled_windows
from fhir_assets.orchestration.command_runs import execute_command_run
from fhir_assets.orchestration.dead_runs import fail_dead_runs
from fhir_assets.orchestration.failures import EXIT_CODE
from fhir_assets.orchestration.instance import config
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
from fhir_assets.pipeline.due_windows import (
    group_consecutive_windows,
)
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.process_ends import ProcessIdentity
from fhir_assets.settings import Settings
from fhir_assets.steps.layers import LayerSteps
from fhir_assets.warehouse.ops import received, replays
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.windows import WindowRange

Listener = Callable[[dg.EventLogEntry], None]
"""Called with each event of a run."""


class Ingestion:
    """Executes the jobs that load windows: due windows, received resources, dead letters to be replayed.

    ``find_received``, ``fetch_missing_references`` and ``replay`` first mark dead runs as failed.
    """

    def __init__(self, settings: Settings, definitions: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self._settings = settings
        self._definitions = definitions
        self._instance = instance
        self._warehouse = Warehouse(settings)
        self.due_loads = DueLoads(settings)

    def fail_dead_runs(self) -> None:
        """Mark dead runs as failed, see ``orchestration.dead_runs``."""
        with self._warehouse.connect() as conn:
            fail_dead_runs(self._instance, conn)

    def count_steps(self) -> int:
        """Return the number of steps in a run of ``incremental_load``."""
        return len(self._definitions.resolve_job_def(INCREMENTAL_LOAD).all_node_defs)

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
        assets = self._select_types(resource_types)
        return self._run(INCREMENTAL_LOAD, windows, refresh, triggered_by, listener, assets)

    def load_due(
        self,
        windows: WindowRange,
        *,
        refresh: Refresh,
        triggered_by: str,
        resource_types: Sequence[str],
        listener: LoadListener,
    ) -> Outcome:
        """Load the types of the windows in one run. Raises DatabaseUnavailable if the database is lost."""

        def listen(event: dg.EventLogEntry) -> None:
            kind = event.dagster_event_type
            if kind is dg.DagsterEventType.STEP_START and event.step_key:
                listener.begin_step(event.step_key)
            elif kind in (dg.DagsterEventType.STEP_SUCCESS, dg.DagsterEventType.STEP_FAILURE):
                listener.end_step()
            elif event.asset_observation and event.asset_observation.description:
                # The raw step reports the progress of a bulk export as observations.
                listener.show(event.asset_observation.description)

        with _translated_storage_errors():
            return self.load(
                windows, refresh=refresh, triggered_by=triggered_by, listener=listen, resource_types=resource_types
            )

    def record(self, request: LoadRequest) -> Outcome:
        """Record the load of another process in a run, whose lock that process holds. Raises as ``load_due`` does."""
        with _translated_storage_errors():
            return self._execute(
                INCREMENTAL_LOAD,
                request.run_id,
                request.windows,
                {REFRESH_TAG: request.refresh.value},
                request.triggered_by,
                self._select_types(request.resource_types),
            )

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
        run_id = str(uuid4())
        if listener:
            self._instance.add_event_listener(run_id, listener)
        with self._warehouse.hold_run(run_id), self._claimed(run_id, claim):
            return self._execute(job, run_id, windows, tags, triggered_by, assets)

    def _select_types(self, resource_types: Sequence[str] | None) -> list[dg.AssetKey] | None:
        """Return the assets of all layers of the types; None for all assets of the job."""
        if resource_types is None or len(resource_types) == len(self._settings.fhir_resource_types):
            return None
        return select_all_layers(self._definitions.resolve_asset_graph(), resource_types)

    def _execute(
        self,
        job: str,
        run_id: str,
        windows: WindowRange,
        tags: Mapping[str, str],
        triggered_by: str,
        assets: list[dg.AssetKey] | None,
    ) -> Outcome:
        single = len(windows.windows) == 1
        checks = [] if assets is None else select_own_checks(self._definitions.resolve_asset_graph(), assets)
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


@contextmanager
def _translated_storage_errors() -> Iterator[None]:
    """Raise the project's errors in place of those of Dagster's storage."""
    try:
        yield
    except (psycopg.OperationalError, sqlalchemy.exc.OperationalError, DagsterPostgresException) as error:
        raise (translate_error(error) or DatabaseUnavailable("Dagster's storage became unavailable")) from None


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


def open_ingestion(
    settings: Settings, *, steps: LayerSteps | None = None, process: ProcessIdentity | None = None
) -> Ingestion:
    """Return the definitions of the deployment with its Dagster instance. Building them takes most of a second.

    ``steps`` are the steps of the layers if another ``process`` executes them.
    """
    instance = config.open_instance(settings)
    return Ingestion(settings, build_definitions(settings, steps=steps, process=process), instance)
