"""The assets ``delivered/<type>``: the resources of the tables, written to the FHIR server at FHIR_DELIVERY_URL.

One step writes all resource types, because references between types, including circular ones, determine the order of
the writes. Windows that do not reconcile are held back; the first run after they reconcile includes them.
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
from fhir_assets.orchestration.assets.outbound import emit_outbound_results
from fhir_assets.orchestration.failures import record_step
from fhir_assets.orchestration.jobs import MISSING_REFERENCES
from fhir_assets.orchestration.run_context import read_run_context
from fhir_assets.pipeline.reconcile.verdicts import select_outbound_windows
from fhir_assets.pipeline.reconcile.window_counts import find_main_view
from fhir_assets.settings import Settings
from fhir_assets.steps.consent import apply_consent
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import dead_letters, held_windows

LAYER = "delivered"
CHECK = "accepted"
"""The check of each asset. It passes if the server has accepted every resource of the type that was sent to it."""


def build_delivered_assets(
    settings: Settings, partitions: dg.PartitionsDefinition[str], views: Sequence[View]
) -> list[dg.AssetsDefinition]:
    """Return the definition of the delivered layer, with an asset for each resource type.

    Return an empty list if FHIR_DELIVERY_URL is not set.
    """
    if not settings.fhir_delivery_url:
        return []
    tables = {view.name for view in views}
    keys = [BY_NAME[name].key for name in settings.fhir_resource_types]

    @dg.multi_asset(
        name="delivered",
        description="Send the loaded resources of the windows to the server at FHIR_DELIVERY_URL.",
        specs=[
            dg.AssetSpec(
                [LAYER, key],
                # In the job backfill, missing references are loaded first, so that the same run delivers them.
                deps=[["validated", key], *([["normalized", key]] if key in tables else []), MISSING_REFERENCES],
                partitions_def=partitions,
                skippable=True,
                group_name=LAYER,
                description=f"{BY_KEY[key].name} resources of the tables, written to the server at FHIR_DELIVERY_URL.",
                kinds={"fhir"},
            )
            for key in keys
        ],
        check_specs=[
            dg.AssetCheckSpec(CHECK, asset=[LAYER, key], description="The server accepted every resource.")
            for key in keys
        ],
        backfill_policy=dg.BackfillPolicy.multi_run(settings.fhir_windows_per_run),
        can_subset=True,
    )
    def delivered(
        context: dg.AssetExecutionContext, store: dg.ResourceParam[Store], warehouse: dg.ResourceParam[Warehouse]
    ) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
        run = read_run_context(context, settings.window_scheme)
        selected = {BY_KEY[key.path[-1]].name: key for key in sorted(context.selected_asset_keys)}
        started = perf_counter()
        client = build_delivery_client(settings, workers=settings.fhir_max_connections, stop=Event())
        destination = f"{LAYER} {client.base_url}"
        with record_step(run, warehouse, list(selected)), client:
            apply_consent(settings, warehouse, views, run)
            with warehouse.connect() as conn:
                outbound = {
                    name: select_outbound_windows(
                        conn,
                        store,
                        destination,
                        name,
                        run.partition_keys,
                        main_view=find_main_view(views, name),
                        run_id=run.run_id,
                    )
                    for name in selected
                }
            step = DeliverStep(
                store,
                warehouse.connect,
                client,
                run_id=run.run_id,
                refresh=run.refresh,
                batch_size=settings.batch_size,
                workers=settings.fhir_max_connections,
            )
            result = step.deliver({name: windows.ready for name, windows in outbound.items()})
            counts = result.counts
            with warehouse.connect() as conn:
                for name, windows in outbound.items():
                    incomplete = result.incomplete.get(name, ())
                    sent = {key: held_at for key, held_at in windows.recorded.items() if key not in incomplete}
                    held_windows.release(conn, destination, name, sent)
                    held_windows.hold(conn, destination, name, incomplete, run_id=run.run_id)
                refused = {name: dead_letters.count_unresolved(conn, name, "deliver") for name in selected}
            seconds = round(perf_counter() - started, 3)
            for name, key in selected.items():
                check = dg.AssetCheckResult(
                    asset_key=key, check_name=CHECK, passed=not refused[name], description=_describe(refused[name])
                )
                is_checked = dg.AssetCheckKey(key, CHECK) in context.selected_asset_check_keys
                yield from emit_outbound_results(
                    context,
                    key,
                    outbound[name].held,
                    {**asdict(counts[name]), "seconds": seconds, "destination": client.base_url},
                    released=outbound[name].released,
                    check_results=[check] if is_checked else [],
                )

    return [delivered]


def _describe(refused: int) -> str:
    if not refused:
        return "the server has accepted every resource that was sent"
    return (
        f"the server refused {refused} resources, which are dead letters: "
        "`fhir-assets dead-letters list --stage deliver` lists the reasons. Correct the resources, then "
        "materialize the windows again"
    )
