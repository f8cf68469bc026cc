"""Which runs are alive: a run holds an advisory lock until its process ends or loses its connection."""

from collections.abc import Sequence
from datetime import datetime

from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection

DEAD = "the run holds no lock in Postgres any more: its process was killed or crashed, or lost its connection"
"""The reason of a dead run about whose process nothing is known."""

_FIND_ALIVE = """
    SELECT run_id
    FROM unnest(%(runs)s::text[]) run_id
    WHERE EXISTS (
        SELECT FROM pg_locks
        WHERE locktype = 'advisory'
            AND granted
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND classid::bigint = %(key)s
            AND objid::bigint = hashtext(run_id)::bigint & 4294967295
    )
"""


def hold_liveness_lock(conn: Connection, run_id: str) -> None:
    """Mark the run as alive until this connection closes. Postgres releases the lock when the process dies."""
    conn.execute("SELECT pg_advisory_lock_shared(%s, hashtext(%s))", [advisory_locks.LIVE_RUN, run_id])


def take_execution(conn: Connection, run_id: str) -> bool:
    """Return whether this connection may execute the run: until it closes, no other connection may."""
    row = conn.execute(
        "SELECT pg_try_advisory_lock(%s, hashtext(%s))", [advisory_locks.EXECUTED_RUN, run_id]
    ).fetchone()
    assert row is not None
    return bool(row[0])


def find_alive(conn: Connection, run_ids: Sequence[str]) -> frozenset[str]:
    """Return the ids among ``run_ids`` whose liveness lock is held by a process."""
    rows = conn.execute(_FIND_ALIVE, {"key": advisory_locks.LIVE_RUN, "runs": list(run_ids)})
    return frozenset(run_id for (run_id,) in rows)


def find_dead(conn: Connection) -> list[str]:
    """Return the runs with RUNNING rows whose liveness lock no process holds."""
    started = [
        run_id for (run_id,) in conn.execute("SELECT DISTINCT run_id FROM ops.ingestion_runs WHERE status = 'RUNNING'")
    ]
    return sorted(set(started).difference(find_alive(conn, started)))


def get_server_start(conn: Connection) -> datetime:
    """Return when Postgres was started: no lock is older."""
    row = conn.execute("SELECT pg_postmaster_start_time()").fetchone()
    assert row is not None
    started: datetime = row[0]
    return started
