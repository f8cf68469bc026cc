"""``fetch_missing_references``: what loaded resources refer to and the tables lack is asked for by id."""

from collections import Counter
from collections.abc import Iterator, Sequence

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.jobs import FETCH_MISSING_REFERENCES
from fhir_assets.orchestration.received_windows import materializations
from fhir_assets.orchestration.run_context import sanitized_errors
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL
from fhir_assets.pipeline.hydrate.step import HydrateStep, ReadsById
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.settings import Settings
from fhir_assets.storage.store import Store


def fetch_missing_references(settings: Settings, views: Sequence[View]) -> dg.JobDefinition:
    """Patients first, in batches. What comes is received into raw, whence the sensor ``load_received`` loads it."""

    @dg.op(
        name="ask_for_missing_references",
        pool=FHIR_SERVER_POOL,
        out=dg.Out(dg.Nothing),
        required_resource_keys={"source", "store", "warehouse"},
    )
    def fetch(context: dg.OpExecutionContext) -> Iterator[dg.AssetMaterialization | dg.Output[None]]:
        source: Source = context.resources.source
        store: Store = context.resources.store
        warehouse: Warehouse = context.resources.warehouse
        if not isinstance(source, ReadsById):
            yield dg.Output(None, metadata={"nothing": f"the source {source.name} gives no single resources"})
            return
        offered = source.offered()
        types = [name for name in settings.fhir_resource_types if offered is None or name in offered]
        receiver = Receiver(store, warehouse.connect, settings.window_scheme, settings.fhir_resource_types)
        missing = HydrateStep(warehouse.connect, views, types, source, receiver, run_id=context.run.run_id)
        asked: Counter[str] = Counter()
        found: Counter[str] = Counter()
        deleted: Counter[str] = Counter()
        with sanitized_errors():
            for batch in missing.run():
                asked[batch.resource_type] += batch.requested
                found[batch.resource_type] += batch.found
                deleted[batch.resource_type] += batch.deleted
                yield from materializations(batch.received)
        yield dg.Output(None, metadata={"asked": dict(asked), "found": dict(found), "deleted": dict(deleted)})

    @dg.job(
        name=FETCH_MISSING_REFERENCES,
        executor_def=dg.in_process_executor,
        description="Ask the server by id for what loaded resources refer to and the tables lack, Patients first.",
    )
    def job() -> None:
        fetch()

    return job
