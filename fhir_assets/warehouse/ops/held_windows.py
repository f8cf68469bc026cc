"""``ops.held_windows``: windows that a delivery or export still has to write, until a run includes them.

They were held back because they do not reconcile, or were loaded and are not written yet.
"""

from collections.abc import Iterable, Mapping
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


def release(conn: Connection, destination: str, resource_type: str, held: Mapping[str, datetime]) -> None:
    """Remove the records of windows that a run has included, except of those that were held again in the meantime.

    ``held`` is from ``find_held``, called before the windows were read. A load that was not committed then is not in
    the run, and has another ``held_at``, however early that is.
    """
    keys = sorted(held)
    conn.execute(
        """
        DELETE FROM ops.held_windows AS h
        USING unnest(%(keys)s::text[], %(times)s::timestamptz[]) AS included (partition_key, held_at)
        WHERE h.source = ops.current_source()
            AND h.destination = %(destination)s
            AND h.resource_type = %(type)s
            AND h.partition_key = included.partition_key
            AND h.held_at = included.held_at
        """,
        {"destination": destination, "type": resource_type, "keys": keys, "times": [held[key] for key in keys]},
    )


def find_held(conn: Connection, destination: str, resource_type: str) -> dict[str, datetime]:
    """Return the partition keys of the windows that are held back from a destination, in order, with ``held_at``."""
    rows = conn.execute(
        """
        SELECT partition_key, held_at
        FROM ops.held_windows
        WHERE source = ops.current_source() AND destination = %s AND resource_type = %s
        ORDER BY partition_key
        """,
        [destination, resource_type],
    )
    return dict(rows.fetchall())


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


def list_unreconciled(conn: Connection) -> list[tuple[str, str, str]]:
    """Return those of ``list_held`` whose last evaluation failed. The others only wait for the next run of the type."""
    return conn.execute(
        """
        SELECT h.destination, h.resource_type, h.partition_key
        FROM ops.held_windows h
        JOIN ops.window_verdicts v USING (source, resource_type, partition_key)
        WHERE h.source = ops.current_source() AND v.reconciled IS FALSE
        ORDER BY 1, 2, 3
        """
    ).fetchall()
