"""The Dagster resources that steps use: ``source``, ``store``, ``warehouse``, ``steps``, ``workers``, ``validator``.

IO managers are in ``io_managers/``.
"""

from collections.abc import Callable, Iterator, Mapping

import dagster as dg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.source import Source
from fhir_assets.orchestration.run_processes import record_process
from fhir_assets.steps.layers import LocalSteps
from fhir_assets.storage.store import Store


def build_resources(
    *, store: Store, warehouse: Warehouse, steps: LocalSteps, open_source: Callable[[], Source]
) -> Mapping[str, object]:
    """Return the resources by key. ``open_source`` is called when a run initializes the resource ``source``.

    The resource ``warehouse`` holds the advisory lock of the run, which shows other processes that the run is alive,
    and records which process executes the run. ``steps`` are executed while it holds the lock.
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

    @dg.resource(required_resource_keys={"warehouse"})
    def steps_resource() -> LocalSteps:
        return steps

    return {
        "source": source_resource,
        "store": store,
        "warehouse": warehouse_resource,
        "steps": steps_resource,
        "workers": steps.workers,
        "validator": steps.validator,
    }
