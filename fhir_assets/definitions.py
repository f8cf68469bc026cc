"""Everything Dagster loads. Importing this touches no network and no database."""

import warnings
from collections.abc import Callable, Iterator
from functools import cache

import dagster as dg

from fhir_assets import logs
from fhir_assets.deployment.source import open_source
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.validation import build_validator, current_rulesets
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import ViewSet
from fhir_assets.orchestration.assets.delivered import delivered_assets
from fhir_assets.orchestration.assets.delivered_health import health_patient_assets
from fhir_assets.orchestration.assets.exports import export_assets
from fhir_assets.orchestration.assets.lake import lake_assets
from fhir_assets.orchestration.assets.landing import landing_assets
from fhir_assets.orchestration.assets.normalized import broken_view, normalized_assets
from fhir_assets.orchestration.assets.raw import raw_assets
from fhir_assets.orchestration.assets.validated import validated_assets
from fhir_assets.orchestration.checks.table import table_checks
from fhir_assets.orchestration.io_managers.ndjson import NdjsonIOManager
from fhir_assets.orchestration.io_managers.postgres import PostgresIOManager
from fhir_assets.orchestration.jobs import check_tables, incremental_load, load_received, replay_dead_letters
from fhir_assets.orchestration.missing_references import fetch_missing_references
from fhir_assets.orchestration.partitions import partitions_definition
from fhir_assets.orchestration.progress import ProgressRelay
from fhir_assets.orchestration.schedules import check_tables_schedule, incremental_load_schedule
from fhir_assets.orchestration.sensors.alerts import alerts_sensor
from fhir_assets.orchestration.sensors.consent import apply_consent, consent_sensor
from fhir_assets.orchestration.sensors.received import load_received_sensor
from fhir_assets.orchestration.sensors.replays import replay_dead_letters_sensor
from fhir_assets.orchestration.sensors.run_failures import record_failed_runs
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.settings import Executor, Settings, SourceKind, load_settings


def executor_of(settings: Settings) -> dg.ExecutorDefinition:
    """What runs of chosen assets work with; those of the jobs work in one process. Raises ConfigurationError."""
    match settings.fhir_executor:
        case Executor.MULTIPROCESS:
            return dg.multiprocess_executor
        case Executor.K8S:
            try:
                from dagster_k8s import k8s_job_executor
            except ImportError:
                raise ConfigurationError(
                    "FHIR_EXECUTOR=k8s needs dagster-k8s: pip install 'fhir-assets[k8s]'"
                ) from None
            return k8s_job_executor
        case _:
            return dg.in_process_executor


def build_definitions(
    settings: Settings,
    *,
    views: ViewSet | None = None,
    warehouse: Warehouse | None = None,
    source: Callable[[], Source] | None = None,
) -> dg.Definitions:
    """The project's Definitions for ``settings``; tests override the parts they replace."""
    with warnings.catch_warnings():
        # Dagster is pinned: what it calls beta or preview cannot change under us.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return _build(settings, views or build_views(settings), warehouse or Warehouse(settings), source)


def _build(
    settings: Settings, views: ViewSet, warehouse: Warehouse, source: Callable[[], Source] | None
) -> dg.Definitions:
    progress = ProgressRelay()
    source = source or cache(lambda: open_source(settings, store=store, warehouse=warehouse, on_progress=progress))
    partitions = partitions_definition(settings.window_scheme)
    store = build_store(settings)
    checks = table_checks(settings, views.views, source, warehouse)
    delivered = delivered_assets(settings, partitions, views.views)
    delivered_keys = [key for each in delivered for key in each.keys]
    job, receiving = incremental_load(checks, delivered_keys), load_received(checks, delivered_keys)
    replay = replay_dead_letters(checks, delivered_keys)
    daily, consent = check_tables(checks), apply_consent(settings, views)

    validator = build_validator(settings)

    @dg.resource
    def source_resource() -> Source:
        return source()

    @dg.resource
    def warehouse_resource(context: dg.InitResourceContext) -> Iterator[Warehouse]:
        with warehouse.hold_run(context.run.run_id if context.run else "") as held:
            yield held

    loading = dg.Definitions(
        assets=[
            *raw_assets(
                settings, partitions, one_pass=settings.fhir_source is not SourceKind.SEARCH, progress=progress
            ),
            *validated_assets(settings, partitions),
            *normalized_assets(settings, partitions, views.views),
            *delivered,
            *export_assets(settings, partitions, views.views),
            *lake_assets(settings, partitions, views.views),
            *(broken_view(broken) for broken in views.broken),
        ],
        asset_checks=checks,
        executor=executor_of(settings),
        jobs=[job, receiving, replay, daily, consent, fetch_missing_references(settings, views.views)],
        schedules=[
            incremental_load_schedule(settings, job, source, warehouse),
            check_tables_schedule(settings, daily),
        ],
        sensors=[
            replay_dead_letters_sensor(settings, replay, warehouse, current_rulesets(settings, views)),
            record_failed_runs(warehouse),
            alerts_sensor(settings, warehouse),
            load_received_sensor(settings, receiving, warehouse),
            *([consent_sensor(settings, consent, warehouse)] if settings.gate.closed else ()),
        ],
        resources={
            "ndjson": NdjsonIOManager(store, warehouse),
            "postgres": PostgresIOManager(warehouse, {view.name: view.resource_type for view in views.views}),
            "source": source_resource,
            "store": store,
            "warehouse": warehouse_resource,
            "workers": WorkerPool(settings.workers),
            "validator": validator,
        },
    )
    return dg.Definitions.merge(
        loading, landing_assets(settings, warehouse), health_patient_assets(settings, warehouse)
    )


@dg.definitions
def defs() -> dg.Definitions:
    """What the code location serves: the settings of the environment."""
    settings = load_settings()
    logs.configure("dagster", settings.log_level, libraries=False)
    return build_definitions(settings)
