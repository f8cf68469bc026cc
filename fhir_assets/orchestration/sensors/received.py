"""The sensor ``load_received``: requests runs that load resources that arrived in raw without a fetch."""

from collections.abc import Iterator
from datetime import UTC, datetime

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.dagster_internals import UnresolvedAssetJobDefinition
from fhir_assets.orchestration.dead_runs import fail_dead_runs
from fhir_assets.orchestration.jobs import LOAD_RECEIVED
from fhir_assets.orchestration.received_windows import group_windows, select_assets, select_own_checks
from fhir_assets.orchestration.run_requests import UNFINISHED, build_run_request
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import post_loader, received

MAX_RUNS = 10
"""The largest number of runs that one tick requests."""


def build_load_received_sensor(
    settings: Settings, job: UnresolvedAssetJobDefinition, warehouse: Warehouse
) -> dg.SensorDefinition:
    """Return the sensor that requests runs over the windows of ``ops.received`` that are not loaded.

    An entry of ``ops.received`` is removed when its rows are committed, not when its run is requested: a window whose
    run failed or crashed is requested again, after a delay that doubles with each attempt. A tick requests no run while
    a run of the job is unfinished. While a post loader runs, posts of the last seconds are left to it.
    """

    @dg.sensor(
        job=job,
        name=LOAD_RECEIVED,
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Requests runs for resources that did not come from the source: landing files, the HTTP API, the "
        "CSV intake, missing references and corrections.",
    )
    def load_received(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        with warehouse.connect() as conn:
            fail_dead_runs(context.instance, conn)
        unfinished = context.instance.get_runs_count(dg.RunsFilter(job_name=job.name, statuses=UNFINISHED))
        if unfinished:
            yield dg.SkipReason(f"{unfinished} runs of {job.name} are not finished yet")
            return
        now = datetime.now(UTC)
        with warehouse.connect() as conn:
            reserved_since = post_loader.find_reserved_since(conn, now)
            pending = received.find_pending(conn, now=now, reserved_since=reserved_since)
            waiting = group_windows(settings, pending)[:MAX_RUNS]
            received.record_request(conn, [entry for run_windows in waiting for entry in run_windows.pending], now=now)
        if not waiting:
            yield dg.SkipReason("all received resources are loaded")
        assert context.repository_def
        graph = context.repository_def.asset_graph
        for run_windows in waiting:
            assets = select_assets(graph, run_windows.resource_types)
            yield build_run_request(
                run_windows.windows,
                run_key=f"{now:%Y-%m-%dT%H:%M:%S}/{run_windows.run_key}",
                tags={},
                assets=assets,
                checks=select_own_checks(graph, assets),
            )

    return load_received
