"""``landing``: the files of FHIR_LANDING_URL on their way into raw. Unset: no such asset.

A sensor looks at the zone and asks for a run where files are complete. The run puts them into raw, which the sensor
``load_received`` sees: it brings them into the tables.
"""

from collections.abc import Iterator
from time import perf_counter

import dagster as dg

from fhir_assets.deployment.landing import build_landing_step, build_landing_zone
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.received_windows import materializations
from fhir_assets.orchestration.run_context import sanitized_errors
from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets.pipeline.landing.step import LandingResult
from fhir_assets.pipeline.receive.receiver import Received
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import landing_files
from fhir_assets.warehouse.ops.landing_files import ZoneState

KEY = dg.AssetKey(["landing"])
CHECK = "files_are_whole"
JOB = "load_landing"

_LOOK_SECONDS = 30
_SAMPLE = 20


def landing_assets(settings: Settings, warehouse: Warehouse) -> dg.Definitions:
    """The asset, its check, its job and the sensor that looks at the zone; nothing where there is no zone."""
    if not settings.fhir_landing_url:
        return dg.Definitions()

    @dg.asset(
        key=KEY,
        group_name="landing",
        description="NDJSON, JSON, Bundle and CSV files that were put into the landing zone, each content once.",
        kinds={"fhir", "json", "csv"},
        check_specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=KEY,
                description="Every landed file could be read, and all of its lines be used or settled.",
            )
        ],
    )
    def landing(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        def report(received: Received) -> None:
            for event in materializations(received):
                context.log_event(event)

        started = perf_counter()
        with sanitized_errors():
            landed = build_landing_step(settings, warehouse).run(context.run.run_id, on_received=report)
        with sanitized_errors(), warehouse.connect() as conn:
            found = landing_files.state(conn, build_landing_zone(settings).url, sample=_SAMPLE)
        yield dg.MaterializeResult(metadata=_metadata(landed, perf_counter() - started), check_results=[checked(found)])

    job = dg.define_asset_job(
        JOB,
        selection=[KEY],
        executor_def=dg.in_process_executor,
        description="Receive what lies complete in the landing zone.",
    )

    @dg.sensor(
        job=job,
        name=JOB,
        minimum_interval_seconds=_LOOK_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Looks for new files in the landing zone.",
    )
    def load_landing(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        with sanitized_errors():
            waiting = build_landing_step(settings, warehouse).scan()
        with sanitized_errors(), warehouse.connect() as conn:
            found = landing_files.state(conn, build_landing_zone(settings).url, sample=_SAMPLE)
        # A letter that was settled meanwhile turns the check green without a run.
        said = f"{found.bad} bad files"
        events = [] if context.cursor in (None, said) else [_evaluation(found)]
        unfinished = context.instance.get_runs_count(dg.RunsFilter(job_name=JOB, statuses=UNFINISHED))
        if unfinished or not waiting:
            reason = f"a run of {JOB} is not finished yet" if unfinished else "no file waits"
            return dg.SensorResult(skip_reason=reason, asset_events=events, cursor=said)
        return dg.SensorResult(run_requests=[dg.RunRequest()], asset_events=events, cursor=said)

    return dg.Definitions(assets=[landing], jobs=[job], sensors=[load_landing])


def checked(found: ZoneState) -> dg.AssetCheckResult:
    """Whether the zone holds a bad file; files are named by the beginning of their hash, since a name may hold a
    patient's.
    """
    return dg.AssetCheckResult(
        passed=not found.bad, check_name=CHECK, asset_key=KEY, description=_said(found), metadata=_state(found)
    )


def _evaluation(found: ZoneState) -> dg.AssetCheckEvaluation:
    result = checked(found)
    return dg.AssetCheckEvaluation(
        asset_key=KEY, check_name=CHECK, passed=result.passed, description=result.description, metadata=result.metadata
    )


def _said(found: ZoneState) -> str:
    if not found.bad:
        return "every landed file is whole"
    return (
        f"{found.bad} landed files are bad: `fhir-assets landing list --status bad` names them. Their other lines are "
        "loaded. Put a corrected file beside or in place of each, and discard its dead letters"
    )


def _state(found: ZoneState) -> dict[str, dg.MetadataValue]:
    return {
        "bad_files": dg.IntMetadataValue(found.bad),
        **{f"{status}_files": dg.IntMetadataValue(count) for status, count in sorted(found.by_status.items())},
        "sample": dg.MetadataValue.table(
            [dg.TableRecord({"content": c, "rejected": r, "what": what}) for c, r, what in found.sample],
            schema=dg.TableSchema(
                [dg.TableColumn("content"), dg.TableColumn("rejected", "int"), dg.TableColumn("what")]
            ),
        ),
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
