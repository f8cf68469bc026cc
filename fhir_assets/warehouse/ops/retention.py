"""Deletion of rows of schema ``ops`` after their retention time."""

from datetime import datetime

from psycopg import sql

from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection

BATCH = 10_000
"""The number of rows that one transaction deletes."""

_EXPIRED = {
    # Discarded dead letters are kept: reconciliation counts them.
    "dead_letters": sql.SQL("status = 'resolved' AND resolved_at < %(before)s"),
    "incidents": sql.SQL("closed_at < %(before)s"),
    "record_posts": sql.SQL("posted_at < %(before)s"),
}
_KEYS = {"record_posts": sql.SQL("source, task_id")}
"""The primary keys of the tables whose key is not ``id``."""


def count_expired_rows(conn: Connection, table: str, before: datetime) -> int:
    """Count the dead letters resolved, the incidents closed, or the records posted, before a time.

    ``table`` is ``dead_letters``, ``incidents`` or ``record_posts``.
    """
    query = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(sql.Identifier("ops", table), _EXPIRED[table])
    row = conn.execute(query, {"before": before}).fetchone()
    return int(row[0]) if row else 0


def delete_expired_rows(conn: Connection, table: str, before: datetime) -> int:
    """Delete the rows that ``count_expired_rows`` counts, in batches, and return their number."""
    query = sql.SQL(
        "DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM {table} WHERE {expired} LIMIT {batch})"
    ).format(
        table=sql.Identifier("ops", table),
        key=_KEYS.get(table, sql.SQL("id")),
        expired=_EXPIRED[table],
        batch=sql.Literal(BATCH),
    )
    total = 0
    while True:
        with conn.transaction():
            deleted = conn.execute(query, {"before": before}).rowcount
        total += deleted
        if deleted < BATCH:
            return total


def find_oldest_running(conn: Connection) -> datetime | None:
    """Return the start of the oldest load or receipt that is in progress, None if there is none.

    The start of a receipt is that of the session that holds the lock of its origin. If this user may not see it, a time
    before all files is returned.
    """
    row = conn.execute(
        """
        SELECT least(
            (SELECT min(started_at) FROM ops.ingestion_runs WHERE status = 'RUNNING'),
            (
                SELECT min(coalesce(s.backend_start, '0001-01-02 00:00:00+00'))
                FROM pg_locks l
                JOIN pg_stat_activity s USING (pid)
                WHERE l.locktype = 'advisory'
                    AND l.granted
                    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                    AND l.classid::bigint = %s
            )
        )
        """,
        [advisory_locks.RECEIVED_ORIGIN],
    ).fetchone()
    return row[0] if row else None
