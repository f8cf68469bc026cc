"""Checks of a table over all windows, computed by queries in the database.

The quick ones are evaluated by each load (``checks/after_load.py``). All of them are evaluated after loads, at most
once in CHECKS_MINUTES (the sensor ``check_changed_tables``), once a day (job and schedule ``check_tables``), and on
request. Checks of one window are in ``checks/window.py``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import FhirAssetsError
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import View, find_reference_columns
from fhir_assets.orchestration.check_names import (
    FRESH,
    NO_DUPLICATES,
    NO_FAILED_PARTITIONS,
    NO_PLAINTEXT_PHI,
    PATIENTS_KNOWN,
    REFERENCES_RESOLVE,
    SCHEMA_MATCHES,
    VOLUME,
)
from fhir_assets.orchestration.checks.known_patients import DESCRIPTION as PATIENTS_KNOWN_DESCRIPTION
from fhir_assets.orchestration.checks.known_patients import evaluate_known_patients
from fhir_assets.orchestration.checks.metadata import rows_table
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.pipeline.reconcile.window_volume import compare_volumes
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import checkpoints, run_history
from fhir_assets.warehouse.postgres.db.connections import Connection, Session
from fhir_assets.warehouse.postgres.queries import quality, references
from fhir_assets.warehouse.postgres.tables import plaintext_scan, view_tables
from fhir_assets.windows import Window, WindowScheme

_GRACE = timedelta(minutes=15)
"""The time that a scheduled load may take before its resource type counts as late."""

_MAX_COMMANDS = 3
_MAX_SHOWN_WINDOWS = 20
_MAX_SHOWN_FORMS = 5
_MAX_SHOWN_DIFFERENCES = 100

_DESCRIPTIONS = {
    FRESH: "The table is loaded up to the second to last tick of the schedule.",
    SCHEMA_MATCHES: "The tables of the resource type have the columns and indexes of their ViewDefinitions.",
    NO_DUPLICATES: "The main table has one row for each resource.",
    NO_FAILED_PARTITIONS: "The last run of every window succeeded.",
    REFERENCES_RESOLVE: "The resources to which the tables refer are loaded.",
    NO_PLAINTEXT_PHI: "If keys are set, columns tagged as patient data and complete resources are encrypted (sampled).",
    VOLUME: "Each of the latest complete windows has a similar number of resources to the windows before it.",
}


def build_table_checks(
    settings: Settings, views: Sequence[View], open_source: Callable[[], Source], warehouse: Warehouse
) -> list[dg.AssetChecksDefinition]:
    """Return the checks of the main table of each resource type, one step for each type."""
    by_type = {name: [view for view in views if view.resource_type == name] for name in settings.fhir_resource_types}
    return [
        _build_checks(settings, BY_NAME[name], views_of_type, open_source, warehouse)
        for name, views_of_type in by_type.items()
        if any(view.name == BY_NAME[name].key for view in views_of_type)
    ]


def list_table_checks(settings: Settings) -> dict[str, str]:
    """Return the names of the checks of each main table with their descriptions, in the order of their evaluation."""
    if build_consent_gate(settings).withholds:
        return {**_DESCRIPTIONS, PATIENTS_KNOWN: PATIENTS_KNOWN_DESCRIPTION}
    return dict(_DESCRIPTIONS)


def _build_checks(
    settings: Settings,
    resource_type: ResourceType,
    views: Sequence[View],
    open_source: Callable[[], Source],
    warehouse: Warehouse,
) -> dg.AssetChecksDefinition:
    asset = dg.AssetKey(["normalized", resource_type.key])
    descriptions = list_table_checks(settings)

    @dg.multi_asset_check(
        name=f"check__{resource_type.key}",
        description=f"Evaluate the checks of the {resource_type.name} tables over all windows.",
        specs=[
            dg.AssetCheckSpec(name, asset=asset, description=description) for name, description in descriptions.items()
        ],
        can_subset=True,
    )
    def check(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        evaluator = TableEvaluator(settings, resource_type, views, open_source)
        selected = {key.name for key in context.selected_asset_check_keys}
        with sanitized_errors(), warehouse.connect() as conn:
            existing = view_tables.find_existing_tables(conn, views)
            for name in (name for name in descriptions if name in selected):
                yield evaluator.evaluate(conn, existing, name)

    return check


class TableEvaluator:
    """Evaluates the checks of one resource type. Only the check ``fresh`` needs ``open_source``."""

    def __init__(
        self,
        settings: Settings,
        resource_type: ResourceType,
        views: Sequence[View],
        open_source: Callable[[], Source] | None = None,
    ) -> None:
        self._settings = settings
        self._type = resource_type
        self._views = views
        self._open_source = open_source

    def evaluate(self, conn: Session, existing: frozenset[str], name: str) -> dg.AssetCheckResult:
        """Return the result of one check, given the names of the tables that exist."""
        if name == FRESH:
            return self._check_fresh(conn)
        if name == NO_FAILED_PARTITIONS:
            return self._check_failed_partitions(conn)
        if name == VOLUME:
            return self._check_volume(conn)
        if name == PATIENTS_KNOWN:
            known = evaluate_known_patients(conn, build_consent_gate(self._settings), self._type.name)
            return self._result(name, known.passed, known.description, known.metadata, severity=known.severity)
        if self._type.key not in existing:
            return self._result(name, True, "not loaded yet")
        present = [view for view in self._views if view.name in existing]
        if name == NO_PLAINTEXT_PHI:
            return self._check_plaintext(conn, present)
        if name == SCHEMA_MATCHES:
            return self._check_schema(conn, present)
        if name == NO_DUPLICATES:
            return self._check_duplicates(conn)
        return self._check_references(conn, present)

    def _check_fresh(self, conn: Connection) -> dg.AssetCheckResult:
        if not self._settings.fhir_base_url:
            return self._result(FRESH, True, "FHIR_BASE_URL is not set")
        assert self._open_source is not None
        source = self._open_source()
        try:
            offered, state = source.list_types(), source.compute_state()
        except FhirAssetsError as error:
            return self._result(FRESH, False, f"the state of the source is unknown: {error}")
        if offered is not None and self._type.name not in offered:
            return self._result(FRESH, True, "the source does not offer this type")
        checkpoint = checkpoints.get(conn, [self._type.name]).get(self._type.name)
        advice = "`fhir-assets ingest` loads the missing windows; `fhir-assets runs list` lists the runs"
        if checkpoint is None:
            return self._result(FRESH, False, f"the first window is not loaded: {advice}")
        now = datetime.now(UTC)
        loaded_until = checkpoint.loaded_until
        metadata = {
            "loaded_until": dg.MetadataValue.timestamp(loaded_until),
            "lag_seconds": max(0.0, (now - loaded_until).total_seconds()),
        }
        if state is not None:
            passed = state == checkpoint.source_state
            description = "the files are loaded" if passed else f"the files changed since they were loaded: {advice}"
            return self._result(FRESH, passed, description, metadata)
        # A load reads up to the time at which it begins, and the schedule waits for the load before it.
        expected = _find_second_to_last_tick(self._settings.fhir_schedule, now - _GRACE)
        passed = loaded_until >= expected
        description = f"loaded up to {loaded_until:%Y-%m-%d %H:%M} UTC"
        if not passed:
            description += (
                f", but {expected:%Y-%m-%d %H:%M} is expected: check that the schedule incremental_load is running and "
                f"that its runs succeed. {advice}"
            )
        return self._result(FRESH, passed, description, metadata)

    def _check_failed_partitions(self, conn: Connection) -> dg.AssetCheckResult:
        failed = run_history.find_failed_windows(conn, self._type.name)
        description = "the last run of every window succeeded"
        if failed:
            keys = [window.partition_key for window in failed]
            commands = [
                f"`fhir-assets ingest --types {self._type.name} --from {first[:10]} --to {last[:10]}`"
                for first, last in _find_consecutive_ranges(self._settings.window_scheme, keys)
            ]
            more = f" and {len(commands) - _MAX_COMMANDS} more ranges" if len(commands) > _MAX_COMMANDS else ""
            description = (
                f"the last run of {len(failed)} windows failed. Correct the causes of the errors, then load these "
                f"windows again: {', '.join(commands[:_MAX_COMMANDS])}{more}"
            )
        table = rows_table(
            ("window", "run", "error"),
            [(window.partition_key, window.run_id, window.error or "") for window in failed[:_MAX_SHOWN_WINDOWS]],
        )
        metadata = {"failed_partitions": len(failed), "sample": table}
        return self._result(NO_FAILED_PARTITIONS, not failed, description, metadata)

    def _check_schema(self, conn: Session, present: Sequence[View]) -> dg.AssetCheckResult:
        differences = [difference for view in present for difference in view_tables.find_drift(conn, view)]
        description = f"{len(present)} tables match their views"
        if differences:
            description = (
                f"{len(differences)} differences between tables and views. `fhir-assets migrate --apply-view-changes` "
                "changes the tables (it drops columns that a view lacks); then load the windows again"
            )
        table = rows_table(
            ("table", "difference"),
            [(difference.view, str(difference)) for difference in differences[:_MAX_SHOWN_DIFFERENCES]],
        )
        return self._result(SCHEMA_MATCHES, not differences, description, {"differences": table})

    def _check_duplicates(self, conn: Connection) -> dg.AssetCheckResult:
        main = next(view for view in self._views if view.name == self._type.key)
        if _may_repeat(main):
            return self._result(NO_DUPLICATES, True, "not applicable: the view has several rows for a resource")
        duplicates = quality.count_duplicates(conn, main)
        description = "one row for each resource"
        if duplicates:
            description = (
                f"{duplicates} resources have more than one row in fhir.{main.name}: another program wrote to it. "
                f"Materialize normalized/{main.name} of all windows again"
            )
        return self._result(NO_DUPLICATES, not duplicates, description, {"duplicates": duplicates})

    def _check_plaintext(self, conn: Session, present: Sequence[View]) -> dg.AssetCheckResult:
        if not self._settings.encrypts:
            return self._result(NO_PLAINTEXT_PHI, True, "no keys are set: patient data is stored as plain text")
        mismatches = [view.name for view in present if view_tables.find_drift(conn, view)]
        if mismatches:
            description = f"not checked, because tables do not match their views ({', '.join(mismatches)}): see "
            return self._result(NO_PLAINTEXT_PHI, False, description + SCHEMA_MATCHES)
        samples = [sample for view in present for sample in plaintext_scan.scan_view(conn, view)]
        samples += plaintext_scan.scan_resources(conn, self._type.name)
        values, plain = sum(sample.values for sample in samples), sum(sample.plain for sample in samples)
        description = f"all of {values} sampled values are encrypted"
        if plain:
            description = (
                f"{plain} of {values} sampled values are not encrypted: they were stored before keys were set, or "
                "another program wrote them. Run `fhir-assets keys rotate`; if values are still not encrypted, "
                "materialize their windows again"
            )
        table = rows_table(
            ("table", "column", "values:int", "not_encrypted:int"),
            [(sample.table, sample.column, sample.values, sample.plain) for sample in samples if sample.plain],
        )
        metadata = {"sampled": values, "not_encrypted": plain, "by_column": table}
        return self._result(NO_PLAINTEXT_PHI, not plain, description, metadata)

    def _check_references(self, conn: Connection, present: Sequence[View]) -> dg.AssetCheckResult:
        columns = [column for view in present for column in find_reference_columns(view)]
        targets = references.count_references(conn, columns, self._settings.fhir_resource_types)
        total, missing = sum(target.references for target in targets), sum(target.missing for target in targets)
        share = missing / total if total else 0.0
        keyless = references.count_keyless(conn, self._type.name)
        description = f"all of {total} references refer to a loaded resource"
        if missing:
            description = (
                f"{missing} of {total} references ({share:.2%}) refer to resources that are not loaded, most of "
                f"them to {targets[0].target}. `fhir-assets missing-references fetch` asks the server for them; "
                "`fhir-assets dead-letters list` lists those that are dead letters"
            )
        if keyless:
            forms = ", ".join(f"{count} {form}" for form, count in keyless[:_MAX_SHOWN_FORMS])
            description += (
                f". Number of resources with references that have no key, by the form of the reference: {forms}. A "
                "reference has a key if it refers to a resource of the source by id, or to exactly one loaded resource "
                "by identifier. An absolute reference must begin with FHIR_BASE_URL or FHIR_LINK_BASE"
            )
        table = rows_table(
            ("target", "references:int", "missing:int", "share"),
            [
                (target.target, target.references, target.missing, f"{target.missing / target.references:.2%}")
                for target in targets
            ],
        )
        return self._result(
            REFERENCES_RESOLVE,
            not missing and not keyless,
            description,
            {
                "references": total,
                "missing": missing,
                "by_target": table,
                "without_key": rows_table(("form", "resources:int"), keyless),
            },
            severity=dg.AssetCheckSeverity.WARN,
        )

    def _check_volume(self, conn: Connection) -> dg.AssetCheckResult:
        settings = self._settings
        windows = _complete_windows(settings.window_scheme, datetime.now(UTC), 2 * settings.volume_windows)
        compared = windows[-settings.volume_windows :]
        counts = (
            quality.count_loaded_resources(conn, self._type.name, windows[0].key, windows[-1].key) if windows else {}
        )
        volumes = compare_volumes(windows, compared, counts, span=settings.volume_windows)
        unusual = [volume for volume in volumes if volume.unusual]
        description = "every window has a normal number of resources"
        if unusual:
            description = "; ".join(f"{volume.partition_key} has {volume.description}" for volume in unusual[:3])
            description += (
                ". If the source was incomplete at that time, materialize raw, validated and normalized again"
            )
        table = rows_table(
            ("window", "resources:int", "lowest_before:int", "highest_before:int"),
            [(volume.partition_key, volume.rows, volume.lowest, volume.highest) for volume in unusual or volumes],
        )
        metadata = {"unusual_windows": len(unusual), "by_window": table}
        return self._result(VOLUME, not unusual, description, metadata, severity=dg.AssetCheckSeverity.WARN)

    def _result(
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


def _find_second_to_last_tick(cron_schedule: str, now: datetime) -> datetime:
    """Return the tick before the last tick of a cron schedule, in UTC: the start of its last complete interval."""
    intervals = dg.TimeWindowPartitionsDefinition(
        start=now, fmt="%Y-%m-%dT%H:%M", cron_schedule=cron_schedule, timezone="UTC"
    )
    last = intervals.get_prev_partition_window(now, respect_bounds=False)
    assert last is not None  # Without bounds there always is an earlier interval.
    return last.start


def _find_consecutive_ranges(scheme: WindowScheme, keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return the first and last partition key of each range of consecutive windows."""
    ranges: list[tuple[str, str]] = []
    previous_end: datetime | None = None
    for window in sorted((scheme.window(key) for key in keys), key=lambda window: window.end):
        if ranges and window.start == previous_end:
            ranges[-1] = (ranges[-1][0], window.key)
        else:
            ranges.append((window.key, window.key))
        previous_end = window.end
    return ranges


def _may_repeat(view: View) -> bool:
    """Return whether a view may have several rows for one resource."""
    selects = list(view.definition.get("select", ()))
    while selects:
        select = selects.pop()
        if "forEach" in select or "repeat" in select:
            return True
        path = select.get("forEachOrNull")
        if path is not None and not path.endswith("first()"):
            return True
        selects += [*select.get("select", ()), *select.get("unionAll", ())]
    return False


def _complete_windows(scheme: WindowScheme, now: datetime, count: int) -> list[Window]:
    """Return the last ``count`` windows that have ended, or as many as there are, in order."""
    windows: list[Window] = []
    window = scheme.window_at(now)
    while window.start is not None and window.start > scheme.start and len(windows) < count:
        window = scheme.before(window)
        windows.append(window)
    return windows[::-1]
