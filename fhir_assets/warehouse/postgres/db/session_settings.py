"""Postgres settings of one connection or transaction."""

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection


def disable_sequential_scans(conn: Connection) -> None:
    """Make the planner of this connection use indexes, even for tables that have no statistics yet."""
    conn.execute("SET enable_seqscan = off")


def limit_lock_wait(conn: Connection, milliseconds: int) -> None:
    """Make statements of this transaction raise LockNotAvailable if they wait for a lock longer than this."""
    conn.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(milliseconds)))
