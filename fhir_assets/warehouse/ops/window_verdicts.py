"""``ops.window_verdicts``: whether each window reconciles. Deliveries, exports and the lake depend on it.

A commit of a partition invalidates the verdict of its window. A window without a row was loaded before this table
existed, or has no partition.
"""

from collections.abc import Mapping, Sequence

from fhir_assets.warehouse.postgres.db.connections import Connection

NOT_EVALUATED = "the window changed since it was last reconciled"


def invalidate(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> None:
    """Record that the partitions of windows are about to change: the verdicts are unknown until the next evaluation."""
    conn.execute(
        """
        INSERT INTO ops.window_verdicts AS v (resource_type, partition_key)
        SELECT %(type)s, unnest(%(keys)s::text[])
        ON CONFLICT (source, resource_type, partition_key) DO UPDATE SET
            reconciled = NULL,
            faults = '',
            changes = v.changes + 1,
            evaluated_at = NULL
        """,
        {"type": resource_type, "keys": sorted(set(partition_keys))},
    )


def read_changes(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> dict[str, int]:
    """Return the change numbers of windows, to be passed to ``record``. Call it before the windows are reconciled."""
    rows = conn.execute(
        """
        SELECT partition_key, changes
        FROM ops.window_verdicts
        WHERE source = ops.current_source() AND resource_type = %s AND partition_key = ANY(%s)
        """,
        [resource_type, list(partition_keys)],
    ).fetchall()
    return dict.fromkeys(partition_keys, 0) | dict(rows)


def record(
    conn: Connection,
    resource_type: str,
    faults_by_window: Mapping[str, Sequence[str]],
    changes: Mapping[str, int],
) -> None:
    """Record the faults of evaluated windows. Windows that changed since ``read_changes`` are left out."""
    keys = sorted(faults_by_window)
    conn.execute(
        """
        INSERT INTO ops.window_verdicts AS v (
            resource_type, partition_key, reconciled, faults, changes, evaluated_at
        )
        SELECT %(type)s, key, faults = '', faults, changes, now()
        FROM unnest(%(keys)s::text[], %(faults)s::text[], %(changes)s::bigint[]) AS windows (key, faults, changes)
        ON CONFLICT (source, resource_type, partition_key) DO UPDATE SET
            reconciled = excluded.reconciled,
            faults = excluded.faults,
            evaluated_at = excluded.evaluated_at
        WHERE v.changes = excluded.changes
        """,
        {
            "type": resource_type,
            "keys": keys,
            "faults": ["; ".join(faults_by_window[key]) for key in keys],
            "changes": [changes[key] for key in keys],
        },
    )


def find_reconciled(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> set[str]:
    """Return those of the windows whose last evaluation passed."""
    rows = conn.execute(
        """
        SELECT partition_key
        FROM ops.window_verdicts
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND partition_key = ANY(%s)
            AND reconciled
        """,
        [resource_type, list(partition_keys)],
    )
    return {key for (key,) in rows}


def find_faults(conn: Connection, resource_type: str, partition_keys: Sequence[str] | None) -> dict[str, str]:
    """Return the reason for each of the windows that does not reconcile or has changed since its last evaluation.

    ``partition_keys`` None stands for all windows.
    """
    rows = conn.execute(
        """
        SELECT partition_key, coalesce(nullif(faults, ''), %(not_evaluated)s)
        FROM ops.window_verdicts
        WHERE source = ops.current_source()
            AND resource_type = %(type)s
            AND (%(keys)s::text[] IS NULL OR partition_key = ANY(%(keys)s))
            AND reconciled IS NOT TRUE
        ORDER BY partition_key
        """,
        {
            "type": resource_type,
            "keys": None if partition_keys is None else list(partition_keys),
            "not_evaluated": NOT_EVALUATED,
        },
    )
    return dict(rows.fetchall())
