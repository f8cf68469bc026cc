"""Assembly of all Dagster definitions: assets, checks, jobs, schedules, sensors and resources.

Importing this module builds no definitions. ``build_definitions`` reads no environment variable and opens no
connection; ``defs``, which the code location names, reads the settings from the environment.
"""

import warnings
from collections.abc import Callable
from functools import cache

import dagster as dg

from fhir_assets import logs
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.extension import extend_idle_types
from fhir_assets.deployment.source import open_quick_source, open_source
from fhir_assets.deployment.sources import build_binding
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.validation import current_rulesets
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import ViewSet
from fhir_assets.file_modes import restrict_umask
from fhir_assets.orchestration.assets.delivered import build_delivered_assets
from fhir_assets.orchestration.assets.delivered_health import build_health_patient
from fhir_assets.orchestration.assets.exports import build_export_assets
from fhir_assets.orchestration.assets.lake import build_lake_assets
from fhir_assets.orchestration.assets.landing import build_landing
from fhir_assets.orchestration.assets.missing_references import build_missing_references
from fhir_assets.orchestration.assets.normalized import build_broken_view, build_normalized_assets
from fhir_assets.orchestration.assets.raw import build_raw_assets
from fhir_assets.orchestration.assets.validated import build_validated_assets
from fhir_assets.orchestration.checks.table import build_table_checks
from fhir_assets.orchestration.executors import build_executor
from fhir_assets.orchestration.io_managers.ndjson import NdjsonIOManager
from fhir_assets.orchestration.io_managers.postgres import PostgresIOManager
from fhir_assets.orchestration.jobs import (
    build_backfill,
    build_check_tables,
    build_incremental_load,
    build_load_received,
    build_replay_dead_letters,
)
from fhir_assets.orchestration.op_jobs import (
    build_apply_consent,
    build_fetch_missing_references,
    build_request_replay,
)
from fhir_assets.orchestration.partitions import build_partitions
from fhir_assets.orchestration.resources import build_resources
from fhir_assets.orchestration.schedules import build_check_tables_schedule, build_incremental_load_schedule
from fhir_assets.orchestration.sensors.alerts import build_alerts_sensor
from fhir_assets.orchestration.sensors.consent import build_consent_sensor
from fhir_assets.orchestration.sensors.received import build_load_received_sensor
from fhir_assets.orchestration.sensors.replays import build_replay_sensor
from fhir_assets.orchestration.sensors.run_failures import build_run_failure_sensor
from fhir_assets.orchestration.sensors.table_checks import build_table_checks_sensor
from fhir_assets.process_ends import ProcessIdentity
from fhir_assets.settings import Settings, SourceKind, load_settings
from fhir_assets.steps.layers import LayerSteps, LocalSteps
from fhir_assets.steps.progress import ProgressRelay


def build_definitions(
    settings: Settings,
    *,
    views: ViewSet | None = None,
    warehouse: Warehouse | None = None,
    source: Callable[[], Source] | None = None,
    steps: LayerSteps | None = None,
    process: ProcessIdentity | None = None,
) -> dg.Definitions:
    """Return the definitions of a deployment.

    Tests can replace parts: ``views`` replaces the ViewDefinitions of the settings, ``warehouse`` the database, and
    ``source`` the function that opens the source. ``steps`` are the steps of the layers if another ``process`` executes
    them. Raises ConfigurationError if a setting is not valid.
    """
    with warnings.catch_warnings():
        # Dagster is pinned, so its beta and preview features do not change unnoticed.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return _build(
            settings, views or build_views(settings), warehouse or Warehouse(settings), source, steps, process
        )


def _build(
    settings: Settings,
    views: ViewSet,
    warehouse: Warehouse,
    source: Callable[[], Source] | None,
    steps: LayerSteps | None,
    process: ProcessIdentity | None,
) -> dg.Definitions:
    store = build_store(settings)
    progress = ProgressRelay()
    quick_source = source or cache(lambda: open_quick_source(settings, store=store, warehouse=warehouse))
    open_any = source or cache(lambda: open_source(settings, store=store, warehouse=warehouse, on_progress=progress))
    # A run retries until an outage of the server is over, because no person waits for it. A schedule's tick must end
    # soon.
    source_of_runs = source or cache(
        lambda: open_source(settings, store=store, warehouse=warehouse, on_progress=progress, persistent=True)
    )
    steps = steps or LocalSteps(settings, store, warehouse, views.views, source_of_runs, progress)
    partitions = build_partitions(settings.window_scheme)
    checks = build_table_checks(settings, views.views, open_any, warehouse)
    delivered = build_delivered_assets(settings, partitions, views.views)
    exports = build_export_assets(settings, partitions, views.views)
    written_keys = [key for asset in (*delivered, *exports) for key in asset.keys]
    incremental_load = build_incremental_load(checks, written_keys)
    missing_references = build_missing_references(settings, partitions, views.views)
    backfill = build_backfill(checks, written_keys)
    load_received = build_load_received(checks, written_keys)
    replay_dead_letters = build_replay_dead_letters(checks, written_keys)
    check_tables = build_check_tables(checks)
    apply_consent = build_apply_consent(settings, views)
    layers = dg.Definitions(
        assets=[
            *build_raw_assets(
                settings,
                partitions,
                one_pass=settings.fhir_source is not SourceKind.SEARCH,
                store_url=store.blobs.url,
            ),
            *build_validated_assets(settings, partitions, store_url=store.blobs.url),
            *build_normalized_assets(settings, partitions, views.views),
            *delivered,
            *exports,
            missing_references,
            *build_lake_assets(settings, partitions, views.views),
            *(build_broken_view(broken) for broken in views.broken),
        ],
        asset_checks=checks,
        executor=build_executor(settings),
        jobs=[
            incremental_load,
            backfill,
            load_received,
            replay_dead_letters,
            check_tables,
            apply_consent,
            build_request_replay(settings),
            build_fetch_missing_references(settings, views.views),
        ],
        schedules=[
            build_incremental_load_schedule(
                settings,
                incremental_load,
                open_any,
                warehouse,
                build_binding(settings, warehouse, store),
                lambda windows, now, seconds: extend_idle_types(
                    settings, quick_source(), store, warehouse, views, windows, now=now, seconds=seconds
                ),
            ),
            build_check_tables_schedule(settings, check_tables),
        ],
        sensors=[
            dg.AutomationConditionSensorDefinition(
                "default_automation_condition_sensor",
                target=dg.AssetSelection.all(include_sources=True),
                description="Materializes the assets of the lake after their tables change. Stopped by default.",
            ),
            build_replay_sensor(settings, replay_dead_letters, warehouse, current_rulesets(settings, views)),
            build_run_failure_sensor(warehouse),
            build_alerts_sensor(settings, warehouse, store, views.views),
            build_table_checks_sensor(settings, check_tables, [key for check in checks for key in check.check_keys]),
            build_load_received_sensor(settings, load_received, warehouse),
            *(
                [build_consent_sensor(settings, apply_consent, warehouse)]
                if build_consent_gate(settings).withholds
                else ()
            ),
        ],
        resources={
            "ndjson": NdjsonIOManager(store, warehouse),
            "postgres": PostgresIOManager(warehouse, views.views),
            **build_resources(
                settings, store=store, warehouse=warehouse, steps=steps, open_source=source_of_runs, process=process
            ),
        },
    )
    return dg.Definitions.merge(layers, build_landing(settings, warehouse), build_health_patient(settings, warehouse))


@dg.definitions
def defs() -> dg.Definitions:
    """Return the definitions that the code location serves, for the settings of the environment.

    Dagster calls this in the code server and in the process of each run and step, whose umask is restricted here.
    """
    restrict_umask()
    settings = load_settings()
    logs.configure("dagster", settings.log_level, libraries=False)
    return build_definitions(settings)
