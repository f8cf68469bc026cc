"""The schedules ``incremental_load`` and ``check_tables``."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.source import Source
from fhir_assets.orchestration.dagster_internals import UnresolvedAssetJobDefinition
from fhir_assets.orchestration.dead_runs import fail_dead_runs
from fhir_assets.orchestration.jobs import CHECK_TABLES, INCREMENTAL_LOAD
from fhir_assets.orchestration.received_windows import select_all_layers, select_own_checks
from fhir_assets.orchestration.run_requests import UNFINISHED, build_run_request
from fhir_assets.pipeline.due_windows import begin_checkpoints, find_due_windows
from fhir_assets.pipeline.sources.binding import SourceBinding
from fhir_assets.settings import Settings
from fhir_assets.windows import WindowRange

_MAX_SECONDS = 20.0
"""The time that a tick may use to find types with new resources. Dagster ends a tick after a minute."""


def build_incremental_load_schedule(
    settings: Settings,
    job: UnresolvedAssetJobDefinition,
    open_source: Callable[[], Source],
    warehouse: Warehouse,
    binding: SourceBinding,
    extend: Callable[[WindowRange, datetime, float], Sequence[str]],
) -> dg.ScheduleDefinition:
    """Return the schedule that requests all windows from the checkpoints to now.

    The first tick after a downtime requests every window of the downtime. A tick requests no run while a run of the job
    is unfinished, so that no window is requested twice. Raises ConfigurationError if FHIR_SCHEDULE is not a cron
    expression.

    ``extend`` extends the windows of types to which the source has added nothing, within some seconds, and returns the
    resource types that a run has to load (see ``deployment.extension``). A tick without such types requests no run.
    """
    decorate = dg.schedule(
        job=job,
        name=INCREMENTAL_LOAD,
        cron_schedule=settings.fhir_schedule,
        execution_timezone="UTC",
        default_status=_default_status(settings),
        description="Requests runs for all windows from the checkpoints to now, for the resource types to which the "
        "source has added something.",
    )

    def incremental_load(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        with warehouse.connect() as conn:
            fail_dead_runs(context.instance, conn)
        unfinished = context.instance.get_runs_count(dg.RunsFilter(job_name=job.name, statuses=UNFINISHED))
        if unfinished:
            yield dg.SkipReason(f"{unfinished} runs of {job.name} are not finished yet")
            return
        binding.require(fetches=True)
        now = context.scheduled_execution_time
        with warehouse.connect() as conn:
            due = find_due_windows(
                conn,
                open_source(),
                settings.fhir_resource_types,
                settings.window_scheme,
                now=now,
                overlap=settings.overlap,
            )
            begin_checkpoints(conn, due)
        if not due:
            yield dg.SkipReason("every window is loaded")
        assets = checks = None
        if len(due) == 1 and not due.new_types:
            types = extend(due.ranges[0], now, _MAX_SECONDS)
            if not types:
                yield dg.SkipReason(f"the source has nothing new up to {now:%Y-%m-%d %H:%M} UTC")
                return
            if len(types) < len(settings.fhir_resource_types):
                assert context.repository_def
                graph = context.repository_def.asset_graph
                assets = select_all_layers(graph, types)
                checks = select_own_checks(graph, assets)
        for windows in due:
            first, last = windows.windows[0].key, windows.windows[-1].key
            run_key = f"{now:%Y-%m-%dT%H:%M}/{first}..{last}"
            yield build_run_request(windows, run_key=run_key, tags={}, assets=assets, checks=checks)

    try:
        return decorate(incremental_load)
    except dg.DagsterInvalidDefinitionError:
        raise _not_a_cron_expression("FHIR_SCHEDULE", settings.fhir_schedule) from None


def build_check_tables_schedule(settings: Settings, job: UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """Return the schedule of the table checks: CHECKS_SCHEDULE, by default once a day.

    Raises ConfigurationError if CHECKS_SCHEDULE is not a cron expression.
    """
    try:
        return dg.ScheduleDefinition(
            name=CHECK_TABLES,
            job=job,
            cron_schedule=settings.checks_schedule,
            execution_timezone="UTC",
            default_status=_default_status(settings),
            description="Evaluates the checks of all tables.",
        )
    except dg.DagsterInvalidDefinitionError:
        raise _not_a_cron_expression("CHECKS_SCHEDULE", settings.checks_schedule) from None


def _default_status(settings: Settings) -> dg.DefaultScheduleStatus:
    return dg.DefaultScheduleStatus.RUNNING if settings.fhir_base_url else dg.DefaultScheduleStatus.STOPPED


def _not_a_cron_expression(variable: str, value: str) -> ConfigurationError:
    return ConfigurationError(
        f"{variable} is not a cron expression: {value!r}; set five fields, for example */15 * * * *"
    )
