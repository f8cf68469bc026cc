"""The kinds of old data that ``fhir-assets prune`` deletes, with functions to count and to delete them.

- In Dagster's database: events and ticks, by the statements of ``warehouse/dagster/pruning.py``, because Dagster has
  no API that deletes them; runs, by ``DagsterInstance.delete_run``.
- In the project's database: dead letters and incidents, by ``warehouse/ops/retention.py``.
- In the store: parts without a manifest, by ``storage/orphans.py``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain

import dagster as dg

from fhir_assets.storage.blobs import ListedFile
from fhir_assets.storage.orphans import find_unfinished_files, find_unreferenced_parts
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.dagster import pruning
from fhir_assets.warehouse.ops import retention
from fhir_assets.warehouse.postgres.db.connections import Connection

LAYERS = ("raw", "validated", "deleted")
_MARGIN = timedelta(hours=1)
"""Parts are deleted only if they are older than the oldest running load by this time."""


@dataclass(frozen=True, slots=True)
class Prunable:
    """One kind of old data."""

    name: str
    description: str
    count: Callable[[], tuple[int, int | None]]
    """Return the number of items that may be deleted, and their size in bytes or None if it is unknown."""
    remove: Callable[[], int]
    """Delete these items and return their number."""


def list_prunable(
    conn: Connection, dagster_conn: Connection, instance: dg.DagsterInstance, store: Store, before: datetime
) -> list[Prunable]:
    """Return all kinds of data that may be deleted if they are older than ``before``.

    ``dagster_conn`` is a connection to Dagster's own database. Data that a running load may still use, that
    reconciliation counts, or that the UI needs to show the state of a partition or check, is never included.
    """
    running = retention.find_oldest_running(conn)
    parts_before = min(before, running - _MARGIN) if running else before

    def list_orphans() -> Iterator[ListedFile]:
        return chain(
            *(find_unreferenced_parts(store, layer, before=parts_before) for layer in LAYERS),
            find_unfinished_files(store.blobs, before=parts_before),
        )

    def count_orphans() -> tuple[int, int]:
        files = list(list_orphans())
        return len(files), sum(file.bytes for file in files)

    def remove_orphans() -> int:
        files = list(list_orphans())
        for file in files:
            store.blobs.delete(file.name)
        return len(files)

    def remove_runs() -> int:
        run_ids = pruning.find_superseded_runs(dagster_conn, before)
        for run_id in run_ids:
            instance.delete_run(run_id)
        return len(run_ids)

    return [
        Prunable(
            "events",
            "events of steps and logs of Dagster's old runs",
            lambda: (pruning.count_old_events(dagster_conn, before), None),
            lambda: pruning.delete_old_events(dagster_conn, before),
        ),
        Prunable(
            "runs",
            "Dagster's old runs that later runs have replaced",
            lambda: (len(pruning.find_superseded_runs(dagster_conn, before)), None),
            remove_runs,
        ),
        Prunable(
            "ticks",
            "old ticks of sensors and schedules",
            lambda: (pruning.count_old_ticks(dagster_conn, before), None),
            lambda: pruning.delete_old_ticks(dagster_conn, before),
        ),
        Prunable(
            "dead-letters",
            "resolved dead letters",
            lambda: (retention.count_expired_rows(conn, "dead_letters", before), None),
            lambda: retention.delete_expired_rows(conn, "dead_letters", before),
        ),
        Prunable(
            "incidents",
            "closed incidents",
            lambda: (retention.count_expired_rows(conn, "incidents", before), None),
            lambda: retention.delete_expired_rows(conn, "incidents", before),
        ),
        Prunable(
            "posts",
            "tasks of posted records",
            lambda: (retention.count_expired_rows(conn, "record_posts", before), None),
            lambda: retention.delete_expired_rows(conn, "record_posts", before),
        ),
        Prunable("store", "parts in the store that no manifest names", count_orphans, remove_orphans),
    ]
