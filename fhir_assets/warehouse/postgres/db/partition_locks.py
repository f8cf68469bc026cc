"""Locks of partitions of the store, shared by all machines that use the database."""

from collections.abc import Sequence

from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection


def lock_partitions(conn: Connection, folders: Sequence[str]) -> None:
    """Lock the partitions in these folders of the store until the transaction ends.

    Every caller takes the locks in the same order, so that callers cannot deadlock.
    """
    conn.execute(
        """
        SELECT pg_advisory_xact_lock(%s, key)
        FROM (SELECT DISTINCT hashtext(name) AS key FROM unnest(%s::text[]) AS name ORDER BY 1) AS keys
        """,
        [advisory_locks.PARTITION_COMMIT, list(folders)],
    )
