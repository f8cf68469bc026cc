"""The Dagster resources that steps use: ``source``, ``binding``, ``store``, ``warehouse``, ``workers``, ``validator``.

IO managers are in ``io_managers/``.
"""

from collections.abc import Callable, Iterator, Mapping

import dagster as dg

from fhir_assets.deployment.sources import build_binding
from fhir_assets.deployment.validation import build_validator
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.source import Source
from fhir_assets.orchestration.run_processes import record_process
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.settings import Settings
from fhir_assets.storage.store import Store


def build_resources(
    settings: Settings, *, store: Store, warehouse: Warehouse, open_source: Callable[[], Source]
) -> Mapping[str, object]:
    """Return the resources by key. ``open_source`` is called when a run initializes the resource ``source``.

    The resource ``warehouse`` holds the advisory lock of the run, which shows other processes that the run is alive,
    and records which process executes the run.
    """

    @dg.resource
    def source_resource() -> Source:
        return open_source()

    @dg.resource
    def warehouse_resource(context: dg.InitResourceContext) -> Iterator[Warehouse]:
        with warehouse.hold_run(context.run.run_id if context.run else "") as held:
            if context.run and context.instance:
                record_process(context.instance, context.run)
            yield held

    return {
        "source": source_resource,
        "binding": build_binding(settings, warehouse, store),
        "store": store,
        "warehouse": warehouse_resource,
        "workers": WorkerPool(settings.workers),
        "validator": build_validator(settings),
    }
