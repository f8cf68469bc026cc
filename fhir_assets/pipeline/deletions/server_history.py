"""What a server deleted since the last look, out of its history and into the tables."""

from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime, timedelta

from fhir_assets.fhir.search.history import DeletionHistory
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.tables import deletions


def apply_server_deletions(
    connect: Callable[[], Session],
    tombstones: DeletionLog,
    history: DeletionHistory,
    resource_types: Sequence[str],
    *,
    run_id: str,
    now: datetime,
    overlap: timedelta,
) -> dict[str, int]:
    """Apply what was deleted of each type since the last time; returns by type how many resources left the tables.

    The first time, since the first load of the type: what was deleted before it was never loaded. Types whose history
    the server does not offer are left out. Raises ServerUnavailable, ServerRefused, NotFhir or DatabaseUnavailable;
    types that were done by then stay done.
    """
    offered = history.offered()
    gone = {}
    for name in resource_types:
        if offered is not None and name not in offered:
            continue
        with closing(connect()) as conn:
            begin = deletions.applied_until(conn, name) or now
            conn.commit()
        found = history.fetch_since(name, begin - overlap)
        gone[name] = tombstones.record(found, run_id=run_id).gone[name]
        with closing(connect()) as conn, conn.transaction():
            # A server whose clock is behind ours dates what it deletes now before our now.
            deletions.advance(conn, name, min(now, history.asked_at or now), run_id)
    return gone
