"""The schedules: what keeps the tables up to date, and what looks after them once a day."""

from collections.abc import Callable, Iterator

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._utils.schedules import is_valid_cron_string

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.source import Source
from fhir_assets.orchestration.dead_runs import give_up_dead_runs
from fhir_assets.orchestration.run_requests import UNFINISHED, run_request
from fhir_assets.pipeline.due_windows import begin_checkpoints, find_due_windows
from fhir_assets.settings import Settings


def incremental_load_schedule(
    settings: Settings, job: UnresolvedAssetJobDefinition, source: Callable[[], Source], warehouse: Warehouse
) -> dg.ScheduleDefinition:
    """Asks for every window from the checkpoints to now, so that it catches up by itself after any downtime.

    Nothing is asked for while an earlier request is still being worked on: no window is asked for twice.
    Raises ConfigurationError if FHIR_SCHEDULE is no cron expression.
    """
    _require_cron("FHIR_SCHEDULE", settings.fhir_schedule)

    @dg.schedule(
        job=job,
        name="incremental_load",
        cron_schedule=settings.fhir_schedule,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING if settings.fhir_base_url else dg.DefaultScheduleStatus.STOPPED,
    )
    def incremental_load(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        with warehouse.connect() as conn:
            give_up_dead_runs(context.instance, conn)
        unfinished = context.instance.get_runs_count(dg.RunsFilter(job_name=job.name, statuses=UNFINISHED))
        if unfinished:
            yield dg.SkipReason(f"{unfinished} runs of {job.name} are not finished yet")
            return
        now = context.scheduled_execution_time
        with warehouse.connect() as conn:
            due = find_due_windows(
                conn,
                source(),
                settings.fhir_resource_types,
                settings.window_scheme,
                now=now,
                overlap=settings.overlap,
            )
            begin_checkpoints(conn, due)
        if not due:
            yield dg.SkipReason("every window is loaded")
        for windows in due:
            first, last = windows.windows[0].key, windows.windows[-1].key
            yield run_request(windows, run_key=f"{now:%Y-%m-%dT%H:%M}/{first}..{last}", tags={})

    return incremental_load


def check_tables_schedule(settings: Settings, job: UnresolvedAssetJobDefinition) -> dg.ScheduleDefinition:
    """Runs the checks of whole tables, once a day unless set. Raises ConfigurationError if CHECKS_SCHEDULE is no cron
    expression.
    """
    _require_cron("CHECKS_SCHEDULE", settings.checks_schedule)
    return dg.ScheduleDefinition(
        name="check_tables",
        job=job,
        cron_schedule=settings.checks_schedule,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING if settings.fhir_base_url else dg.DefaultScheduleStatus.STOPPED,
    )


def _require_cron(variable: str, value: str) -> None:
    if not is_valid_cron_string(value):
        raise ConfigurationError(f"{variable} is no cron expression: {value!r}; give five fields, such as */15 * * * *")
