"""The Dagster resources that steps use: ``source``, ``store``, ``warehouse``, ``steps``, ``workers``, ``validator``.

IO managers are in ``io_managers/``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext

import dagster as dg

from fhir_assets.deployment.validation import build_validator
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.source import Source
from fhir_assets.orchestration.run_processes import record_process
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.process_ends import ProcessIdentity, read_identity
from fhir_assets.settings import Settings
from fhir_assets.steps.layers import LayerSteps
from fhir_assets.storage.store import Store


def build_resources(
    settings: Settings,
    *,
    store: Store,
    warehouse: Warehouse,
    steps: LayerSteps,
    open_source: Callable[[], Source],
    process: ProcessIdentity | None = None,
) -> Mapping[str, object]:
    """Return the resources by key. ``open_source`` is called when a run initializes the resource ``source``.

    The resource ``warehouse`` holds the advisory lock of the run, which shows other processes that the run is alive,
    and records which process executes the run. ``steps`` are executed while it holds the lock. If another ``process``
    executes them, that process holds the lock.
    """

    @dg.resource
    def source_resource() -> Source:
        return open_source()

    @dg.resource
    def warehouse_resource(context: dg.InitResourceContext) -> Iterator[Warehouse]:
        run_id = context.run.run_id if context.run else ""
        with nullcontext(warehouse) if process else warehouse.hold_run(run_id) as held:
            if context.run and context.instance:
                record_process(context.instance, context.run, process or read_identity())
            yield held

    @dg.resource(required_resource_keys={"warehouse"})
    def steps_resource() -> LayerSteps:
        return steps

    return {
        "source": source_resource,
        "store": store,
        "warehouse": warehouse_resource,
        "steps": steps_resource,
        "workers": WorkerPool(settings.workers),
        "validator": build_validator(settings),
    }
