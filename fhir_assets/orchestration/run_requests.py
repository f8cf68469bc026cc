"""Run requests for windows, and the statuses of runs that are not finished."""

from collections.abc import Mapping, Sequence

import dagster as dg

from fhir_assets.orchestration.tags import RANGE_END, RANGE_START
from fhir_assets.windows import WindowRange

UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def range_tags(windows: WindowRange) -> dict[str, str]:
    """Return the tags that make Dagster execute one run over the range of partitions."""
    return {RANGE_START: windows.windows[0].key, RANGE_END: windows.windows[-1].key}


def build_run_request(
    windows: WindowRange,
    *,
    run_key: str,
    tags: Mapping[str, str],
    assets: Sequence[dg.AssetKey] | None = None,
    checks: Sequence[dg.AssetCheckKey] | None = None,
) -> dg.RunRequest:
    """Return the request for one run over ``windows``, with a partition key for one window or range tags for several.

    If ``assets`` is given, the run materializes only these assets of the job and evaluates only ``checks``.
    """
    single = len(windows.windows) == 1
    return dg.RunRequest(
        run_key=run_key,
        partition_key=windows.windows[0].key if single else None,
        tags=dict(tags) if single else {**tags, **range_tags(windows)},
        asset_selection=assets,
        asset_check_keys=checks,
    )
