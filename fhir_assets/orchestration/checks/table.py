"""Checks of a whole table: a query over all of it, so they run once a day (job and schedule ``check_tables``) or when
somebody asks, and not with every load, where they would cost more than an empty window does.

They are computed in the database; nothing is loaded into memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import FhirAssetsError
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.checks.metadata import rows_table
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.pipeline.reconcile.window_volume import compare_volumes
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import checkpoints, run_history
from fhir_assets.warehouse.postgres.db.connections import Connection, Session
from fhir_assets.warehouse.postgres.queries import quality
from fhir_assets.warehouse.postgres.tables import plaintext_scan, view_tables
from fhir_assets.windows import Window, WindowScheme

FRESH = "fresh"
SCHEMA_MATCHES = "schema_matches"
NO_DUPLICATES = "no_duplicates"
REFERENCES_RESOLVE = "references_resolve"
VOLUME = "volume"
NO_FAILED_PARTITIONS = "no_failed_partitions"
NO_PLAINTEXT_PHI = "no_plaintext_phi"

_GRACE = timedelta(minutes=15)
"""How long a load that the schedule asked for may take until its type counts as late."""

_SAMPLE = 3
_SHOWN = 20

_DESCRIBED = {
    FRESH: "The table is loaded up to the schedule's last but one tick.",
    SCHEMA_MATCHES: "The tables of the type have the columns and indexes that their ViewDefinitions ask for.",
    NO_DUPLICATES: "The main table has one row a resource.",
    NO_FAILED_PARTITIONS: "The last run of every window succeeded, so that none is left behind by a backfill.",
    REFERENCES_RESOLVE: "What the type's tables refer to is loaded, by target type.",
    NO_PLAINTEXT_PHI: "With keys: what is tagged as patient data, and the whole resources, are sealed (a sample).",
    VOLUME: "Each of the last windows that ended brought about as many resources as the windows before it.",
}


def build_table_checks(
    settings: Settings, views: Sequence[View], source: Callable[[], Source], warehouse: Warehouse
) -> list[dg.AssetChecksDefinition]:
    """The checks of each type's main table, a step a type."""
    by_type = {name: [view for view in views if view.resource_type == name] for name in settings.fhir_resource_types}
    return [
        _of_type(settings, BY_NAME[name], of_type, source, warehouse)
        for name, of_type in by_type.items()
        if any(view.name == BY_NAME[name].key for view in of_type)
    ]


def _of_type(
    settings: Settings,
    resource_type: ResourceType,
    views: Sequence[View],
    source: Callable[[], Source],
    warehouse: Warehouse,
) -> dg.AssetChecksDefinition:
    asset = dg.AssetKey(["normalized", resource_type.key])

    @dg.multi_asset_check(
        name=f"check__{resource_type.key}",
        specs=[dg.AssetCheckSpec(name, asset=asset, description=text) for name, text in _DESCRIBED.items()],
        can_subset=True,
    )
    def check(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        judge = _Judge(settings, resource_type, views, source)
        wanted = {key.name for key in context.selected_asset_check_keys}
        with sanitized_errors(), warehouse.connect() as conn:
            there = quality.existing_tables(conn, views)
            for name in (name for name in _DESCRIBED if name in wanted):
                yield judge.result(conn, there, name)

    return check


class _Judge:
    def __init__(
        self, settings: Settings, resource_type: ResourceType, views: Sequence[View], source: Callable[[], Source]
    ) -> None:
        self._settings = settings
        self._type = resource_type
        self._views = views
        self._source = source

    def result(self, conn: Session, there: frozenset[str], name: str) -> dg.AssetCheckResult:
        """What one check says, of the tables that are there."""
        if name == FRESH:
            return self._fresh(conn)
        if name == NO_FAILED_PARTITIONS:
            return self._no_failed_partitions(conn)
        if name == VOLUME:
            return self._volume(conn)
        if self._type.key not in there:
            return self._said(name, True, "not loaded yet")
        present = [view for view in self._views if view.name in there]
        if name == NO_PLAINTEXT_PHI:
            return self._no_plaintext_phi(conn, present)
        if name == SCHEMA_MATCHES:
            return self._schema_matches(conn, present)
        if name == NO_DUPLICATES:
            return self._no_duplicates(conn)
        return self._references_resolve(conn, present)

    def _fresh(self, conn: Connection) -> dg.AssetCheckResult:
        if not self._settings.fhir_base_url:
            return self._said(FRESH, True, "no source is set")
        source = self._source()
        try:
            offered, state = source.offered(), source.state()
        except FhirAssetsError as error:
            return self._said(FRESH, False, f"the source cannot be asked: {error}")
        if offered is not None and self._type.name not in offered:
            return self._said(FRESH, True, "the source does not offer this type")
        checkpoint = checkpoints.get(conn, [self._type.name]).get(self._type.name)
        load = "`fhir-assets ingest` loads what is missing; `fhir-assets runs list` says what ran"
        if checkpoint is None:
            return self._said(FRESH, False, f"never loaded from the beginning on: {load}")
        now = datetime.now(UTC)
        until = checkpoint.loaded_until
        metadata = {
            "loaded_until": dg.MetadataValue.timestamp(until),
            "lag_seconds": max(0.0, (now - until).total_seconds()),
        }
        if state is not None:
            passed = state == checkpoint.source_state
            said = "the files are loaded" if passed else f"the files changed since they were loaded: {load}"
            return self._said(FRESH, passed, said, metadata)
        # A load reads up to the moment it begins, and the schedule waits for the load before.
        expected = _last_but_one_tick(self._settings.fhir_schedule, now - _GRACE)
        passed = until >= expected
        said = f"loaded up to {until:%Y-%m-%d %H:%M} UTC"
        if not passed:
            said += (
                f", but {expected:%Y-%m-%d %H:%M} was due: see that the schedule incremental_load is on, and whether "
                f"its runs fail. {load}"
            )
        return self._said(FRESH, passed, said, metadata)

    def _no_failed_partitions(self, conn: Connection) -> dg.AssetCheckResult:
        left = run_history.failed_windows(conn, self._type.name)
        said = "the last run of every window succeeded"
        if left:
            keys = [each.partition_key for each in left]
            commands = [
                f"`fhir-assets ingest --types {self._type.name} --from {first[:10]} --to {last[:10]}`"
                for first, last in stretches(self._settings.window_scheme, keys)
            ]
            more = f" and {len(commands) - _SAMPLE} more stretches" if len(commands) > _SAMPLE else ""
            said = (
                f"the last run of {len(left)} windows failed. Mend what the errors say, then run just those again: "
                f"{', '.join(commands[:_SAMPLE])}{more}"
            )
        table = rows_table(
            ("window", "run", "error"), [(e.partition_key, e.run_id, e.error or "") for e in left[:_SHOWN]]
        )
        return self._said(NO_FAILED_PARTITIONS, not left, said, {"failed_partitions": len(left), "sample": table})

    def _schema_matches(self, conn: Session, present: Sequence[View]) -> dg.AssetCheckResult:
        found = [each for view in present for each in view_tables.find_drift(conn, view)]
        said = f"{len(present)} tables fit their views"
        if found:
            said = (
                f"{len(found)} differences between tables and views. `fhir-assets migrate --apply-view-changes` brings "
                "the tables in line (it drops the columns that a view lacks); then load the windows again"
            )
        table = rows_table(("table", "difference"), [(each.view, str(each)) for each in found[:100]])
        return self._said(SCHEMA_MATCHES, not found, said, {"differences": table})

    def _no_duplicates(self, conn: Connection) -> dg.AssetCheckResult:
        main = next(view for view in self._views if view.name == self._type.key)
        if _repeats(main):
            return self._said(NO_DUPLICATES, True, "the view makes several rows of a resource on purpose")
        twice = quality.count_duplicates(conn, main)
        said = "one row a resource"
        if twice:
            said = (
                f"{twice} resources have more than one row in fhir.{main.name}: something else wrote to it. "
                f"Materialize normalized/{main.name} of all windows again"
            )
        return self._said(NO_DUPLICATES, not twice, said, {"duplicates": twice})

    def _no_plaintext_phi(self, conn: Session, present: Sequence[View]) -> dg.AssetCheckResult:
        if not self._settings.cipher.on:
            return self._said(NO_PLAINTEXT_PHI, True, "there are no keys: everything is in the clear")
        misfits = [view.name for view in present if view_tables.find_drift(conn, view)]
        if misfits:
            said = f"not judged while tables do not fit their views ({', '.join(misfits)}): see schema_matches"
            return self._said(NO_PLAINTEXT_PHI, False, said)
        found = [each for view in present for each in plaintext_scan.scan_view(conn, view)]
        found += plaintext_scan.scan_resources(conn, self._type.name)
        values, plain = sum(each.values for each in found), sum(each.plain for each in found)
        said = f"all of {values} sampled values are sealed"
        if plain:
            said = (
                f"{plain} of {values} sampled values are not sealed: they were stored before there were keys, or "
                "something else wrote them. `fhir-assets keys rotate` seals what was stored before; what is plain "
                "after that, materialize again"
            )
        table = rows_table(
            ("table", "column", "values:int", "in_the_clear:int"),
            [(each.table, each.column, each.values, each.plain) for each in found if each.plain],
        )
        return self._said(
            NO_PLAINTEXT_PHI, not plain, said, {"sampled": values, "in_the_clear": plain, "by_column": table}
        )

    def _references_resolve(self, conn: Connection, present: Sequence[View]) -> dg.AssetCheckResult:
        columns = [column for view in present for column in quality.find_reference_columns(view)]
        found = quality.count_references(conn, columns, self._settings.fhir_resource_types)
        references, missing = sum(each.references for each in found), sum(each.missing for each in found)
        share = missing / references if references else 0.0
        said = f"all of {references} references lead to a loaded resource"
        if missing:
            said = (
                f"{missing} of {references} references ({share:.2%}) lead to resources that are not loaded, most of "
                f"them to {found[0].target}. `fhir-assets missing-references fetch` asks the server for them; those "
                "that are dead letters are listed by `fhir-assets dead-letters list`"
            )
        table = rows_table(
            ("target", "references:int", "missing:int", "share"),
            [(e.target, e.references, e.missing, f"{e.missing / e.references:.2%}") for e in found],
        )
        return self._said(
            REFERENCES_RESOLVE,
            not missing,
            said,
            {"references": references, "missing": missing, "by_target": table},
            severity=dg.AssetCheckSeverity.WARN,
        )

    def _volume(self, conn: Connection) -> dg.AssetCheckResult:
        settings = self._settings
        windows = _ended(settings.window_scheme, datetime.now(UTC), 2 * settings.volume_windows)
        judged = windows[-settings.volume_windows :]
        counted = (
            quality.count_loaded_resources(conn, self._type.name, windows[0].key, windows[-1].key) if windows else {}
        )
        volumes = compare_volumes(windows, judged, counted, span=settings.volume_windows)
        unusual = [each for each in volumes if each.unusual]
        said = "no window stands out"
        if unusual:
            said = "; ".join(f"{each.partition_key} brought {each.description}" for each in unusual[:3])
            said += (
                ". See whether the source was complete then; if not, materialize raw, validated and normalized again"
            )
        table = rows_table(
            ("window", "resources:int", "least_before:int", "most_before:int"),
            [(each.partition_key, each.rows, each.lowest, each.highest) for each in unusual or volumes],
        )
        found = {"unusual_windows": len(unusual), "by_window": table}
        return self._said(VOLUME, not unusual, said, found, severity=dg.AssetCheckSeverity.WARN)

    def _said(
        self,
        name: str,
        passed: bool,
        description: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
    ) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            passed=passed,
            asset_key=dg.AssetKey(["normalized", self._type.key]),
            check_name=name,
            description=description,
            metadata=metadata or {},
            severity=severity,
        )


def _last_but_one_tick(cron_schedule: str, now: datetime) -> datetime:
    """Return the tick before the last tick of a cron schedule, in UTC: the start of its last complete interval."""
    intervals = dg.TimeWindowPartitionsDefinition(
        start=now, fmt="%Y-%m-%dT%H:%M", cron_schedule=cron_schedule, timezone="UTC"
    )
    last = intervals.get_prev_partition_window(now, respect_bounds=False)
    assert last is not None  # respect_bounds=False: there is always an earlier interval
    return last.start


def stretches(scheme: WindowScheme, keys: Sequence[str]) -> list[tuple[str, str]]:
    """First and last key of each unbroken row of windows."""
    found: list[tuple[str, str]] = []
    follows: datetime | None = None
    for window in sorted((scheme.window(key) for key in keys), key=lambda window: window.end):
        begins = found[-1][0] if found and window.start == follows else window.key
        if begins == window.key:
            found.append((window.key, window.key))
        else:
            found[-1] = (begins, window.key)
        follows = window.end
    return found


def _repeats(view: View) -> bool:
    """Whether a view may make several rows of a resource."""
    selects = list(view.definition.get("select", ()))
    while selects:
        each = selects.pop()
        if "forEach" in each or "repeat" in each:
            return True
        over = each.get("forEachOrNull")
        if over is not None and not over.endswith("first()"):
            return True
        selects += [*each.get("select", ()), *each.get("unionAll", ())]
    return False


def _ended(scheme: WindowScheme, now: datetime, count: int) -> list[Window]:
    """The last ``count`` windows that ended, as far as there are so many, in their order."""
    found: list[Window] = []
    window = scheme.window_at(now)
    while window.start is not None and window.start > scheme.start and len(found) < count:
        window = scheme.before(window)
        found.append(window)
    return found[::-1]
