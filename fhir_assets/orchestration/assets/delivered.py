"""``delivered/<type>``: what the tables hold, put on the FHIR server at FHIR_DELIVERY_URL. Unset: no such assets.

One step for all types, because their order, and references in circles between them, hold across types.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from threading import Event
from time import perf_counter

import dagster as dg

from fhir_assets.catalog import BY_KEY, BY_NAME
from fhir_assets.delivery.tables import DeliverStep
from fhir_assets.deployment.targets import build_delivery_client
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.run_context import RunContext, recorded
from fhir_assets.settings import Settings
from fhir_assets.storage.store import Store

LAYER = "delivered"
CHECK = "accepted"


def delivered_assets(
    settings: Settings, partitions: dg.PartitionsDefinition[str], views: Sequence[View]
) -> list[dg.AssetsDefinition]:
    """The delivered layer: one definition of an asset a type, or none."""
    if not settings.fhir_delivery_url:
        return []
    tables = {view.name for view in views}
    keys = [BY_NAME[name].key for name in settings.fhir_resource_types]

    @dg.multi_asset(
        name="delivered",
        specs=[
            dg.AssetSpec(
                [LAYER, key],
                deps=[["validated", key], *([["normalized", key]] if key in tables else [])],
                partitions_def=partitions,
                skippable=True,
                group_name=LAYER,
                description=f"{BY_KEY[key].name} resources of the tables, put on the server at FHIR_DELIVERY_URL.",
                kinds={"fhir"},
            )
            for key in keys
        ],
        check_specs=[
            dg.AssetCheckSpec(CHECK, asset=[LAYER, key], description="The server took every resource it was sent.")
            for key in keys
        ],
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        can_subset=True,
    )
    def delivered(
        context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], warehouse: dg.ResourceParam[Warehouse]
    ) -> Iterator[dg.MaterializeResult[None]]:
        facts = RunContext.of(context, settings.window_scheme)
        wanted = {BY_KEY[key.path[-1]].name: key for key in sorted(context.selected_asset_keys)}
        started = perf_counter()
        client = build_delivery_client(settings, workers=settings.fhir_max_connections, stop=Event())
        with recorded(facts, warehouse, list(wanted)), client:
            delivery = DeliverStep(
                store,
                warehouse.connect,
                client,
                run_id=facts.run_id,
                refresh=facts.refresh,
                batch_size=settings.batch_size,
                workers=settings.fhir_max_connections,
            )
            counts = delivery.deliver(list(wanted), facts.partition_keys)
            seconds = round(perf_counter() - started, 3)
            for name, key in wanted.items():
                of_type = counts[name]
                yield dg.MaterializeResult(
                    asset_key=key,
                    metadata={**asdict(of_type), "seconds": seconds, "destination": client.base_url},
                    check_results=[
                        dg.AssetCheckResult(
                            asset_key=key,
                            check_name=CHECK,
                            passed=not of_type.failed,
                            description=_said(of_type.failed),
                        )
                    ]
                    if dg.AssetCheckKey(key, CHECK) in context.selected_asset_check_keys
                    else [],
                )

    return [delivered]


def _said(failed: int) -> str:
    if not failed:
        return "the server has all of them"
    return (
        f"{failed} were refused: `fhir-assets dead-letters list --stage deliver` says why; then materialize the "
        "windows again"
    )
