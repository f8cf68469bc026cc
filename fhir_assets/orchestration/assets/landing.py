"""The asset ``landing``: files of the landing zone at FHIR_LANDING_URL, received into raw.

The sensor ``load_landing`` requests a run when the zone contains complete files. The run writes their resources to raw;
the sensor ``load_received`` then requests a run that validates and loads them.
"""

from collections.abc import Iterator
from time import perf_counter

import dagster as dg

from fhir_assets.deployment.landing import build_landing_step, build_landing_zone
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.checks.metadata import rows_table
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.jobs import LOAD_LANDING
from fhir_assets.orchestration.received_windows import build_materializations
from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets.pipeline.landing.step import LandingResult
from fhir_assets.pipeline.receive.receiver import Received
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import landing_files, landing_reports
from fhir_assets.warehouse.ops.landing_reports import ZoneState

KEY = dg.AssetKey(["landing"])
CHECK = "files_are_whole"
"""The check of the asset: every landed file is readable, and each of its lines is stored or a resolved dead letter."""

_INTERVAL_SECONDS = 30
_SAMPLE_SIZE = 20


def build_landing(settings: Settings, warehouse: Warehouse) -> dg.Definitions:
    """Return the asset, its check, its job and its sensor; empty definitions if FHIR_LANDING_URL is not set."""
    if not settings.fhir_landing_url:
        return dg.Definitions()

    @dg.asset(
        key=KEY,
        group_name="landing",
        description="NDJSON, JSON, Bundle and CSV files of the landing zone; files of equal content are received once.",
        kinds={"fhir", "json", "csv"},
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=KEY,
                description="Every landed file is readable, and each of its lines is stored or a resolved dead letter.",
            )
        ],
    )
    def landing(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        def report(received: Received) -> None:
            for event in build_materializations(received):
                context.log_event(event)

        started = perf_counter()
        with sanitized_errors():
            landed = build_landing_step(settings, warehouse).run(context.run.run_id, on_received=report)
        with sanitized_errors(), warehouse.connect() as conn:
            state = landing_reports.get_zone_state(conn, build_landing_zone(settings).url, sample=_SAMPLE_SIZE)
        yield dg.MaterializeResult(
            metadata=_metadata(landed, perf_counter() - started), check_results=[_evaluate(state)]
        )

    job = dg.define_asset_job(
        LOAD_LANDING,
        selection=[KEY],
        executor_def=dg.in_process_executor,
        description="Receive the complete files of the landing zone.",
    )

    @dg.sensor(
        job=job,
        name=LOAD_LANDING,
        minimum_interval_seconds=_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Requests a run when the landing zone contains complete files.",
    )
    def load_landing(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        with sanitized_errors():
            waiting = build_landing_step(settings, warehouse).scan()
        with sanitized_errors(), warehouse.connect() as conn:
            zone = build_landing_zone(settings).url
            state = landing_reports.get_zone_state(conn, zone, sample=_SAMPLE_SIZE)
            retries = landing_files.find_retries(conn, zone)
        # The result of the check can change without a run, for example when dead letters of the files are resolved.
        cursor = f"{state.bad} bad files"
        events = [] if context.cursor in (None, cursor) else [_evaluation_event(state)]
        unfinished = context.instance.get_runs_count(dg.RunsFilter(job_name=LOAD_LANDING, statuses=UNFINISHED))
        if unfinished or not waiting:
            idle = f"no complete file is waiting; {retries}" if retries else "no complete file is waiting"
            reason = f"a run of {LOAD_LANDING} is not finished yet" if unfinished else idle
            return dg.SensorResult(skip_reason=reason, asset_events=events, cursor=cursor)
        return dg.SensorResult(run_requests=[dg.RunRequest()], asset_events=events, cursor=cursor)

    return dg.Definitions(assets=[landing], jobs=[job], sensors=[load_landing])


def _evaluate(state: ZoneState) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=not state.bad,
        check_name=CHECK,
        asset_key=KEY,
        description=_describe(state),
        metadata=_state_metadata(state),
    )


def _evaluation_event(state: ZoneState) -> dg.AssetCheckEvaluation:
    result = _evaluate(state)
    return dg.AssetCheckEvaluation(
        asset_key=KEY, check_name=CHECK, passed=result.passed, description=result.description, metadata=result.metadata
    )


def _describe(state: ZoneState) -> str:
    if not state.bad:
        return "every landed file was received completely"
    return (
        f"{state.bad} landed files are bad: `fhir-assets landing list --status bad` lists them. Their other lines are "
        "loaded. Add a corrected version of each file or replace it, then discard the dead letters of the bad file"
    )


def _state_metadata(state: ZoneState) -> dict[str, dg.MetadataValue]:
    return {
        "bad_files": dg.IntMetadataValue(state.bad),
        **{f"{status}_files": dg.IntMetadataValue(count) for status, count in sorted(state.by_status.items())},
        # Files are listed by the beginning of their hash, because a file name may contain the name of a patient.
        "sample": rows_table(("content", "rejected:int", "reason"), state.sample),
    }


def _metadata(landed: LandingResult, seconds: float) -> dict[str, int | float]:
    return {
        "files": landed.files,
        "files_failed": landed.failed,
        "files_known_before": landed.known_before,
        "received": landed.rows,
        "dead_letters": landed.rejected,
        "deleted": landed.deleted,
        "seconds": round(seconds, 3),
        "rows_per_second": round(landed.rows / seconds) if seconds else 0,
    }
