"""Reports of the assets that write data outside of the warehouse (deliveries, exports, the lake).

They name the windows that a run held back, and those of earlier runs that it included. The decision which windows to
hold back is in ``pipeline.reconcile.verdicts``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from fhir_assets.orchestration.checks.metadata import rows_table
from fhir_assets.orchestration.step_log import log_line

_MAX_SHOWN_WINDOWS = 20
_MAX_NAMED_WINDOWS = 3


def describe_held(held: Mapping[str, str]) -> str:
    """Return a message that names the windows that are held back, and the next step."""
    return (
        f"held back because they do not reconcile: {name_windows(list(held))}. The check reconciles names the causes; "
        "the windows leave with the first run after they reconcile"
    )


def name_windows(partition_keys: Sequence[str]) -> str:
    """Return the first partition keys, and how many more there are."""
    more = len(partition_keys) - _MAX_NAMED_WINDOWS
    return ", ".join(partition_keys[:_MAX_NAMED_WINDOWS]) + (f" and {more} more" if more > 0 else "")


def emit_outbound_results(
    context: dg.AssetExecutionContext,
    asset_key: dg.AssetKey,
    held: Mapping[str, str],
    metadata: Mapping[str, Any],
    *,
    released: Sequence[str] = (),
    check_results: Sequence[dg.AssetCheckResult] = (),
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    """Materialize an asset in the windows that were written: those of the run that are not held, and ``released``.

    ``held`` has the reason for each window that is held back. These windows get no materialization, so that the UI does
    not show them as delivered.
    """
    shown = {**metadata, **_build_metadata(held, released)}
    name = asset_key.to_user_string()
    if held:
        log_line(context, f"{name}: {len(held)} windows are {describe_held(held)}")
    if released:
        log_line(
            context, f"{name}: {len(released)} windows that earlier runs left reconcile now: {name_windows(released)}"
        )
    held_back = [key for key in context.partition_keys if key in held]
    written = [*released, *(key for key in context.partition_keys if key not in held)] if held_back else released
    for key in written:
        context.log_event(dg.AssetMaterialization(asset_key, partition=key, metadata=shown))
    if held_back:
        yield from check_results
    else:
        yield dg.MaterializeResult(asset_key=asset_key, metadata=shown, check_results=check_results)


def _build_metadata(held: Mapping[str, str], released: Sequence[str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"windows_held_back": len(held)}
    if held:
        metadata["held_back"] = rows_table(("window", "reason"), list(held.items())[:_MAX_SHOWN_WINDOWS])
    if released:
        metadata["windows_taken_up"] = dg.MetadataValue.text(name_windows(released))
    return metadata
