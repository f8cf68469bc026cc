"""The verdict of each window: whether it reconciles. Deliveries, exports and the lake hold back windows that do not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from fhir_assets.fhir.views import View
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts, reconcile
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import held_windows, window_verdicts
from fhir_assets.warehouse.postgres.db.connections import Session


def evaluate_windows(
    conn: Session, store: Store, resource_type: str, partition_keys: Sequence[str], *, main_view: View | None
) -> list[WindowCounts]:
    """Reconcile windows and record their verdicts. Return the counts, as ``reconcile`` does. Commits.

    A window from which posts in progress were left out gets no verdict: they, or other resources, may still be missing.
    """
    keys = list(partition_keys)
    changes = window_verdicts.read_changes(conn, resource_type, keys)
    conn.commit()
    counts = reconcile(conn, store, resource_type, keys, main_view=main_view)
    conn.commit()
    faults = {window.partition_key: window.faults for window in counts if window.faults or not window.in_progress}
    window_verdicts.record(conn, resource_type, faults, changes)
    conn.commit()
    return counts


def evaluate_unreconciled_windows(
    conn: Session, store: Store, resource_type: str, partition_keys: Sequence[str], *, main_view: View | None
) -> None:
    """Evaluate those of the windows that failed their last evaluation or were not evaluated since their last change."""
    passed = window_verdicts.find_reconciled(conn, resource_type, partition_keys)
    unreconciled = [key for key in partition_keys if key not in passed]
    if unreconciled:
        evaluate_windows(conn, store, resource_type, unreconciled, main_view=main_view)


@dataclass(frozen=True, slots=True)
class OutboundWindows:
    """The windows of one type that may be written to a destination, and those that are held back.

    ``ready`` are in order and include ``released``: those that an earlier run held back. ``held`` has the reason for
    each window that is held back. ``recorded`` has the records of ``ready`` windows to release once they are written.
    """

    ready: tuple[str, ...]
    released: tuple[str, ...]
    held: Mapping[str, str]
    recorded: Mapping[str, datetime]


def select_outbound_windows(
    conn: Session,
    store: Store,
    destination: str,
    resource_type: str,
    partition_keys: Sequence[str],
    *,
    main_view: View | None,
    run_id: str,
) -> OutboundWindows:
    """Select the windows to write to ``destination``: those of the run, and those that earlier runs held back.

    Windows that do not reconcile are held back and recorded, so that a later run includes them. Windows without a
    partition need no reconciliation. The verdicts are read in the transaction that records the held windows.
    """
    before = held_windows.find_held(conn, destination, resource_type)
    keys = sorted({*partition_keys, *before})
    evaluate_unreconciled_windows(conn, store, resource_type, keys, main_view=main_view)
    conn.commit()
    with conn.transaction():
        held = window_verdicts.find_faults(conn, resource_type, keys)
        held_windows.hold(conn, destination, resource_type, held, run_id=run_id)
    wanted = frozenset(partition_keys)
    ready = [key for key in keys if key not in held]
    recorded = {key: held_at for key, held_at in before.items() if key not in held}
    return OutboundWindows(tuple(ready), tuple(key for key in ready if key not in wanted), held, recorded)
