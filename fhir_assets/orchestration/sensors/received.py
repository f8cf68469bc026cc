"""What was received by other doors than the source, on its way into the tables."""

from collections.abc import Iterator
from datetime import UTC, datetime

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.dead_runs import give_up_dead_runs
from fhir_assets.orchestration.received_windows import assets_of, group
from fhir_assets.orchestration.run_requests import UNFINISHED, run_request
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops import received

RUNS_AT_ONCE = 10
"""How many runs one tick asks for at most."""


def load_received_sensor(
    settings: Settings, job: UnresolvedAssetJobDefinition, warehouse: Warehouse
) -> dg.SensorDefinition:
    """Asks for runs over the windows that were received and are not in the tables yet.

    A window is done when its rows are committed, not when its run was asked for: one whose run failed or died is asked
    for again, after a wait that doubles. Nothing is asked for while an earlier request is being worked on.
    """

    @dg.sensor(
        job=job,
        name="load_received",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Loads what was received by other doors than the source: landing files, intake, corrections.",
    )
    def load_received(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        with warehouse.connect() as conn:
            give_up_dead_runs(context.instance, conn)
        unfinished = context.instance.get_runs_count(dg.RunsFilter(job_name=job.name, statuses=UNFINISHED))
        if unfinished:
            yield dg.SkipReason(f"{unfinished} runs of {job.name} are not finished yet")
            return
        now = datetime.now(UTC)
        with warehouse.connect() as conn:
            waiting = group(settings, received.pending(conn, now=now))[:RUNS_AT_ONCE]
            received.ask(conn, [each for part in waiting for each in part.pending], now=now)
        if not waiting:
            yield dg.SkipReason("all that was received is loaded")
        assert context.repository_def
        graph = context.repository_def.asset_graph
        for part in waiting:
            yield run_request(
                part.windows,
                run_key=f"{now:%Y-%m-%dT%H:%M:%S}/{part.run_key}",
                tags={},
                assets=assets_of(graph, part.resource_types),
            )

    return load_received
