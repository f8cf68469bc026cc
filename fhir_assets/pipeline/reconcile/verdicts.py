"""The verdict of each window, which decides whether the window leaves the house: deliveries, exports and the lake."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fhir_assets.fhir.views import View
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts, reconcile
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import held_windows, window_verdicts
from fhir_assets.warehouse.postgres.db.connections import Session


def evaluate_windows(
    conn: Session, store: Store, resource_type: str, partition_keys: Sequence[str], *, main_view: View | None
) -> list[WindowCounts]:
    """Reconcile windows and record their verdicts. Return the counts, as ``reconcile`` does. Commits."""
    keys = list(partition_keys)
    changes = window_verdicts.read_changes(conn, resource_type, keys)
    conn.commit()
    counts = reconcile(conn, store, resource_type, keys, main_view=main_view)
    conn.commit()
    faults = {window.partition_key: window.faults for window in counts}
    window_verdicts.record(conn, resource_type, faults, changes)
    conn.commit()
    return counts


def evaluate_doubtful_windows(
    conn: Session, store: Store, resource_type: str, partition_keys: Sequence[str], *, main_view: View | None
) -> None:
    """Evaluate those of the windows whose last evaluation failed, or that were not evaluated since they changed."""
    passed = window_verdicts.find_evaluated(conn, resource_type, partition_keys)
    doubtful = [key for key in partition_keys if key not in passed]
    if doubtful:
        evaluate_windows(conn, store, resource_type, doubtful, main_view=main_view)


@dataclass(frozen=True, slots=True)
class Departure:
    """The windows of one type that may leave, and those that are held back.

    ``cleared`` are in order and contain ``taken_up``, which an earlier run held back. ``held`` is the reason by window.
    """

    cleared: tuple[str, ...]
    taken_up: tuple[str, ...]
    held: Mapping[str, str]


def plan_departure(
    conn: Session,
    store: Store,
    destination: str,
    resource_type: str,
    partition_keys: Sequence[str],
    *,
    main_view: View | None,
    run_id: str,
) -> Departure:
    """Decide which windows go to ``destination``: those of the run, and those that earlier runs held back.

    Windows that do not reconcile are held back, and recorded, so that a later run takes them up. Windows without a
    partition have nothing to reconcile. The verdicts are read in the transaction that records the held windows.
    """
    before = held_windows.find_held(conn, destination, resource_type)
    keys = sorted({*partition_keys, *before})
    evaluate_doubtful_windows(conn, store, resource_type, keys, main_view=main_view)
    conn.commit()
    with conn.transaction():
        held = window_verdicts.find_faults(conn, resource_type, keys)
        held_windows.hold(conn, destination, resource_type, held, run_id=run_id)
    wanted = frozenset(partition_keys)
    cleared = [key for key in keys if key not in held]
    return Departure(tuple(cleared), tuple(key for key in cleared if key not in wanted), held)
