"""The windows that the command line loads: which are due, and which it extends without a run."""

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from math import inf

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
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.pipeline.due_windows import (
    DueWindows,
    begin_checkpoints,
    find_due_windows,
    find_extent,
    split_into_runs,
)
from fhir_assets.pipeline.type_failures import TypeFailures
from fhir_assets.settings import Settings
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets.windows import Interval


class DueLoads:
    """Finds the windows that are due, and extends those to which the source has added nothing."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._warehouse = Warehouse(settings)

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

    def find(
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
        settings = self._settings
        build_binding(settings, self._warehouse).require(fetches=True)
        now = datetime.now(UTC)
        scheme = settings.window_scheme
        source = open_source(settings, warehouse=self._warehouse, on_progress=on_progress)
        if first is None and last is None and not all_windows:
            with self._warehouse.connect() as conn:
                return find_due_windows(
                    conn, source, settings.fhir_resource_types, scheme, now=now, overlap=settings.overlap
                )
        extent = self._find_extent(source) if first is None or last is None else None
        if first is None:
            first = now if extent is None else extent.start or scheme.start
        last = last or (extent.end if extent and source.compute_state() is not None else now)
        return DueWindows(tuple(split_into_runs(scheme, scheme.between(first, min(last, now)))))

    def begin_checkpoints(self, due: DueWindows) -> None:
        """Begin the checkpoints of the resource types that are loaded for the first time."""
        with self._warehouse.connect() as conn:
            begin_checkpoints(conn, due)

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

    def find_types_not_offered(self) -> list[str]:
        """Return the resource types of the settings that the source does not offer; loads skip them."""
        offered = open_source(self._settings, warehouse=self._warehouse).list_types()
        return [] if offered is None else [t for t in self._settings.fhir_resource_types if t not in offered]

    def apply_consent(self, *, actor: str) -> None:
        """Withhold or release resources in the tables according to the current consents, as a run would."""
        views, gate = build_views(self._settings).views, build_consent_gate(self._settings)
        ConsentStep(self._warehouse.connect, views, gate, run_id=actor, actor=actor).run(datetime.now(UTC))

    def _find_extent(self, source: Source) -> Interval | None:
        """Return the extent of the offered types, without those that the source refuses: their steps will fail."""
        offered = source.list_types()
        types = [name for name in self._settings.fhir_resource_types if offered is None or name in offered]
        failures = TypeFailures()
        extent = find_extent(source, types, failures)
        if len(failures) == len(types):
            failures.raise_collected()
        return extent
