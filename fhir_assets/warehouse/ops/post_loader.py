"""Coordination of the post loader: receipts of posts notify it, and a lock shows whether it runs.

The lock belongs to a session of the loader. Postgres releases it as soon as the process ends, even if it is killed, so
that the sensors of Dagster load the posts instead.
"""

from datetime import datetime, timedelta

from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection

GRACE = timedelta(seconds=30)
"""The age up to which the sensors leave a post to a running post loader."""

_CHANNEL = "fhir_assets_posts"


def notify(conn: Connection) -> None:
    """Wake the post loader when this transaction is committed."""
    conn.execute("SELECT pg_notify(%s, ops.current_source())", [_CHANNEL])


def listen(conn: Connection) -> None:
    """Receive the notifications of all later commits over this connection."""
    conn.execute(f"LISTEN {_CHANNEL}")


def try_begin(conn: Connection) -> bool:
    """Mark the post loader of the source as running until this connection closes. Return False if another one runs."""
    row = conn.execute(
        "SELECT pg_try_advisory_lock(%s, hashtext(ops.current_source()))", [advisory_locks.POST_LOADER]
    ).fetchone()
    return row is not None and bool(row[0])


def is_running(conn: Connection) -> bool:
    """Return whether a post loader of the source runs."""
    row = conn.execute(
        """
        SELECT EXISTS (
            SELECT
            FROM pg_locks
            WHERE locktype = 'advisory'
                AND granted
                AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND classid::bigint = %s
                AND objid::bigint = hashtext(ops.current_source())::bigint & 4294967295
        )
        """,
        [advisory_locks.POST_LOADER],
    ).fetchone()
    return row is not None and bool(row[0])


def find_reserved_since(conn: Connection, now: datetime) -> datetime | None:
    """Return the time since which posts are reserved for the post loader, or None if no post loader runs."""
    return now - GRACE if is_running(conn) else None
