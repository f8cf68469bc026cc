"""What deliveries, exports and the lake report: the windows that they pass over, and those that they take up later."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from fhir_assets.orchestration.checks.metadata import rows_table
from fhir_assets.orchestration.step_log import log_line

_MAX_SHOWN_WINDOWS = 20
_MAX_NAMED_WINDOWS = 3


def describe_held(held: Mapping[str, str]) -> str:
    """Return a sentence that names the windows that are held back, and what to do about them."""
    return (
        f"held back because they do not reconcile: {name_windows(list(held))}. The check reconciles names the causes; "
        "the windows leave with the first run after they reconcile"
    )


def name_windows(partition_keys: Sequence[str]) -> str:
    """Return the first partition keys, and how many more there are."""
    more = len(partition_keys) - _MAX_NAMED_WINDOWS
    return ", ".join(partition_keys[:_MAX_NAMED_WINDOWS]) + (f" and {more} more" if more > 0 else "")


def emit_departure(
    context: dg.AssetExecutionContext,
    asset_key: dg.AssetKey,
    held: Mapping[str, str],
    metadata: Mapping[str, Any],
    *,
    taken_up: Sequence[str] = (),
    check_results: Sequence[dg.AssetCheckResult] = (),
) -> Iterator[dg.MaterializeResult[None] | dg.AssetCheckResult]:
    """Materialize an asset in the windows that left: those of the run that are not held, and ``taken_up``.

    ``held`` is the reason by window. Windows that are held back get no materialization, so that the UI does not show
    them as delivered.
    """
    shown = {**metadata, **_build_metadata(held, taken_up)}
    name = asset_key.to_user_string()
    if held:
        log_line(context, f"{name}: {len(held)} windows are {describe_held(held)}")
    if taken_up:
        log_line(
            context, f"{name}: {len(taken_up)} windows that were held back reconcile now: {name_windows(taken_up)}"
        )
    passed_over = [key for key in context.partition_keys if key in held]
    left = [*taken_up, *(key for key in context.partition_keys if key not in held)] if passed_over else taken_up
    for key in left:
        context.log_event(dg.AssetMaterialization(asset_key, partition=key, metadata=shown))
    if passed_over:
        yield from check_results
    else:
        yield dg.MaterializeResult(asset_key=asset_key, metadata=shown, check_results=check_results)


def _build_metadata(held: Mapping[str, str], taken_up: Sequence[str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"windows_held_back": len(held)}
    if held:
        metadata["held_back"] = rows_table(("window", "reason"), list(held.items())[:_MAX_SHOWN_WINDOWS])
    if taken_up:
        metadata["windows_taken_up"] = dg.MetadataValue.text(name_windows(taken_up))
    return metadata
