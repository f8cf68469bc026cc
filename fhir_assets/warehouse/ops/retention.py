"""Rows of schema ``ops`` that have had their time."""

from datetime import datetime

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection

BATCH = 10_000
"""Rows of one deletion, in a transaction of its own."""

_OLD = {
    # Discarded ones stay: reconciliation counts them.
    "dead_letters": sql.SQL("status = 'resolved' AND resolved_at < %(before)s"),
    "incidents": sql.SQL("closed_at < %(before)s"),
}


def count_expired_rows(conn: Connection, table: str, before: datetime) -> int:
    """How many rows of ``ops.<table>`` may go: resolved dead letters, incidents that are over."""
    query = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(sql.Identifier("ops", table), _OLD[table])
    row = conn.execute(query, {"before": before}).fetchone()
    return int(row[0]) if row else 0


def delete_expired_rows(conn: Connection, table: str, before: datetime) -> int:
    """Delete them, a batch at a time. Returns how many."""
    query = sql.SQL("DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE {old} LIMIT {batch})").format(
        table=sql.Identifier("ops", table), old=_OLD[table], batch=sql.Literal(BATCH)
    )
    total = 0
    while True:
        with conn.transaction():
            deleted = conn.execute(query, {"before": before}).rowcount
        total += deleted
        if deleted < BATCH:
            return total


def find_oldest_running(conn: Connection) -> datetime | None:
    """When the longest load that is still at work began; None if nothing is."""
    row = conn.execute("SELECT min(started_at) FROM ops.ingestion_runs WHERE status = 'RUNNING'").fetchone()
    return row[0] if row else None
