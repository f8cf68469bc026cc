"""Repeats failed checks of windows, because their cause can disappear without a run.

For example, if dead letters are discarded, the check of their window passes again.
"""

from collections.abc import Sequence
from time import monotonic

import dagster as dg

from fhir_assets.catalog import BY_KEY
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.check_names import DEAD_LETTER_RATE, RECONCILES
from fhir_assets.orchestration.checks.window import WindowChecks
from fhir_assets.pipeline.reconcile.verdicts import evaluate_windows
from fhir_assets.pipeline.reconcile.window_counts import find_main_view
from fhir_assets.settings import Settings
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops.incidents import Incident
from fhir_assets.warehouse.postgres.db.connections import Session

_MAX_WINDOWS = 5
_MAX_SECONDS = 10


def reevaluate_failed_windows(
    instance: dg.DagsterInstance,
    conn: Session,
    store: Store,
    views: Sequence[View],
    settings: Settings,
    incidents: Sequence[Incident],
    *,
    after: int,
) -> int:
    """Evaluate some windows of open check incidents again, and report those that pass to Dagster.

    ``after`` is the number of windows that earlier calls evaluated. Return the number for the next call, which
    continues with the windows after them.
    """
    windows = [
        (asset.rpartition("/")[2], check, key)
        for incident in incidents
        if incident.kind == "check"
        for asset, _, check in [incident.name.rpartition(":")]
        if check in (RECONCILES, DEAD_LETTER_RATE) and asset.rpartition("/")[2] in BY_KEY
        for key in incident.partitions
        if key
    ]
    start = after % len(windows) if windows else 0
    end = monotonic() + _MAX_SECONDS
    evaluated = 0
    for type_key, check, key in (windows[start:] + windows[:start])[:_MAX_WINDOWS]:
        if monotonic() > end:
            break
        resource_type = BY_KEY[type_key]
        name = resource_type.name
        counts = evaluate_windows(conn, store, name, [key], main_view=find_main_view(views, name))
        for evaluation in WindowChecks(resource_type, settings).evaluate_outside_run(instance, conn, counts, check):
            if evaluation.passed:
                instance.report_runless_asset_event(evaluation)
        conn.commit()
        evaluated += 1
    return (start + evaluated) % len(windows) if windows else 0
