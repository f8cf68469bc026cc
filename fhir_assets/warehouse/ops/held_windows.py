"""``ops.held_windows``: windows that a delivery or export still has to write, until a run includes them.

They were held back because they do not reconcile, or were loaded and are not written yet.
"""

from collections.abc import Iterable
from datetime import datetime

from fhir_assets.warehouse.postgres.db.connections import Connection


def name_export_destination(export_url: str) -> str:
    """Return the destination of the exports of runs to ``export_url``."""
    return f"exports {export_url}"


def hold(conn: Connection, destination: str, resource_type: str, partition_keys: Iterable[str], *, run_id: str) -> None:
    """Record windows that a run held back, and when: ``held_at`` is the time of the last call."""
    conn.execute(
        """
        INSERT INTO ops.held_windows (destination, resource_type, partition_key, run_id, held_at)
        SELECT %(destination)s, %(type)s, unnest(%(keys)s::text[]), %(run)s, clock_timestamp()
        ON CONFLICT (source, destination, resource_type, partition_key) DO UPDATE SET held_at = excluded.held_at
        """,
        {"destination": destination, "type": resource_type, "keys": sorted(set(partition_keys)), "run": run_id},
    )


def read_clock(conn: Connection) -> datetime:
    """Return the database's time, for ``release``. Call it before the windows are read."""
    [(now,)] = conn.execute("SELECT clock_timestamp()").fetchall()
    assert isinstance(now, datetime)
    return now


def release(
    conn: Connection, destination: str, resource_type: str, partition_keys: Iterable[str], *, before: datetime
) -> None:
    """Remove the records of windows that a run has included, except of those that were held again since ``before``."""
    conn.execute(
        """
        DELETE FROM ops.held_windows
        WHERE source = ops.current_source()
            AND destination = %s
            AND resource_type = %s
            AND partition_key = ANY(%s)
            AND held_at < %s
        """,
        [destination, resource_type, list(partition_keys), before],
    )


def find_held(conn: Connection, destination: str, resource_type: str) -> list[str]:
    """Return the partition keys of the windows that are held back from a destination, in order."""
    rows = conn.execute(
        """
        SELECT partition_key
        FROM ops.held_windows
        WHERE source = ops.current_source() AND destination = %s AND resource_type = %s
        ORDER BY partition_key
        """,
        [destination, resource_type],
    )
    return [key for (key,) in rows]


def list_held(conn: Connection) -> list[tuple[str, str, str]]:
    """Return all windows that are held back: (destination, resource type, partition key), in order."""
    return conn.execute(
        """
        SELECT destination, resource_type, partition_key
        FROM ops.held_windows
        WHERE source = ops.current_source()
        ORDER BY 1, 2, 3
        """
    ).fetchall()
