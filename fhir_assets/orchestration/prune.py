"""What may go, counted and taken away."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain

import dagster as dg

from fhir_assets.storage.blobs import Listed
from fhir_assets.storage.orphans import left_in_spool, unnamed_parts
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.dagster import pruning
from fhir_assets.warehouse.ops import retention
from fhir_assets.warehouse.postgres.db.connections import Connection

LAYERS = ("raw", "validated", "deleted")
_MARGIN = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of thing that grows old: ``count`` says how many may go (and their bytes), ``remove`` takes them away."""

    name: str
    what: str
    count: Callable[[], tuple[int, int | None]]
    remove: Callable[[], int]


def kinds(
    conn: Connection, dagster_conn: Connection, instance: dg.DagsterInstance, store: Store, before: datetime
) -> list[Kind]:
    """Every kind there is, with what of it is older than ``before``. ``dagster_conn`` is to Dagster's own database.

    Nothing that a load at work may still name, that reconciliation counts, or on which the state of a partition or
    of a check in the UI rests, is among it.
    """
    running = retention.oldest_running(conn)
    unwritten = min(before, running - _MARGIN) if running else before

    def garbage() -> Iterator[Listed]:
        return chain(
            *(unnamed_parts(store, layer, before=unwritten) for layer in LAYERS),
            left_in_spool(store, before=unwritten),
        )

    def count_garbage() -> tuple[int, int]:
        found = list(garbage())
        return len(found), sum(each.bytes for each in found)

    def remove_garbage() -> int:
        found = list(garbage())
        for each in found:
            store.blobs.delete(each.name)
        return len(found)

    def remove_runs() -> int:
        found = pruning.find_superseded_runs(dagster_conn, before)
        for run_id in found:
            instance.delete_run(run_id)
        return len(found)

    return [
        Kind(
            "events",
            "steps and logs of Dagster's old runs",
            lambda: (pruning.count_old_events(dagster_conn, before), None),
            lambda: pruning.delete_old_events(dagster_conn, before),
        ),
        Kind(
            "runs",
            "Dagster's old runs that were done again since",
            lambda: (len(pruning.find_superseded_runs(dagster_conn, before)), None),
            remove_runs,
        ),
        Kind(
            "ticks",
            "old ticks of sensors and schedules",
            lambda: (pruning.count_old_ticks(dagster_conn, before), None),
            lambda: pruning.delete_old_ticks(dagster_conn, before),
        ),
        Kind(
            "dead-letters",
            "resolved dead letters",
            lambda: (retention.old_rows(conn, "dead_letters", before), None),
            lambda: retention.delete_old_rows(conn, "dead_letters", before),
        ),
        Kind(
            "incidents",
            "incidents that are over",
            lambda: (retention.old_rows(conn, "incidents", before), None),
            lambda: retention.delete_old_rows(conn, "incidents", before),
        ),
        Kind("store", "parts of the store that no partition names", count_garbage, remove_garbage),
    ]
