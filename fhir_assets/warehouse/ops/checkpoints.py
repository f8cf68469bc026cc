"""``ops.checkpoints`` and ``ops.loaded_parts``: the time up to which each type is loaded, and the loaded parts."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from fhir_assets.warehouse.postgres.db.connections import Connection


class LoadedPart(Protocol):
    """A part of a partition in the store."""

    @property
    def name(self) -> str:
        """The name of the part."""
        ...

    @property
    def rows(self) -> int:
        """The number of resources in the part."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every resource of a type that was updated before ``loaded_until`` is loaded.

    ``moved_at`` is the time at which the checkpoint last moved. For ``source_state`` see Source.compute_state.
    """

    loaded_until: datetime
    source_state: str | None
    moved_at: datetime


def get(conn: Connection, resource_types: Sequence[str]) -> dict[str, Checkpoint]:
    """Return the checkpoints of the types that have one, by type."""
    rows = conn.execute(
        """
        SELECT resource_type, loaded_until, source_state, updated_at
        FROM ops.checkpoints
        WHERE source = ops.current_source()
            AND resource_type = ANY(%s)
        """,
        [list(resource_types)],
    )
    return {name: Checkpoint(*values) for name, *values in rows}


def begin(conn: Connection, resource_types: Sequence[str], start: datetime, *, source_state: str | None) -> None:
    """Set the checkpoints of types to ``start``. No other function moves a checkpoint back.

    ``source_state`` is the current Source.compute_state.
    """
    conn.execute(
        """
        INSERT INTO ops.checkpoints (resource_type, loaded_until, source_state)
        SELECT resource_type, %s, %s FROM unnest(%s::text[]) resource_type ORDER BY 1
        ON CONFLICT (resource_type, source) DO UPDATE SET
            loaded_until = excluded.loaded_until,
            source_state = excluded.source_state,
            run_id = NULL,
            updated_at = now()
        """,
        [start, source_state, list(resource_types)],
    )


def advance(conn: Connection, resource_type: str, window_start: datetime | None, until: datetime, run_id: str) -> bool:
    """Record that a window is loaded from its start to ``until``. Return True if the checkpoint moved.

    The checkpoint moves only forward and never over a gap: a window that begins after the checkpoint does not move it.
    """
    moved = conn.execute(
        """
        UPDATE ops.checkpoints
        SET loaded_until = %(until)s, run_id = %(run)s, updated_at = now()
        WHERE source = ops.current_source()
            AND resource_type = %(type)s
            AND loaded_until < %(until)s
            AND (%(start)s::timestamptz IS NULL OR loaded_until >= %(start)s)
        """,
        {"until": until, "run": run_id, "type": resource_type, "start": window_start},
    )
    return moved.rowcount == 1


def get_loaded_parts(
    conn: Connection, resource_type: str, partition_keys: Sequence[str], *, views: Sequence[str] = ()
) -> dict[str, frozenset[str]]:
    """Return the parts of each partition that are loaded into the tables of ``views``.

    Partitions without such parts are left out.
    """
    rows = conn.execute(
        """
        SELECT partition_key, array_agg(part)
        FROM ops.loaded_parts
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND partition_key = ANY(%s)
            AND (views IS NULL OR views @> %s::text[])
        GROUP BY 1
        """,
        [resource_type, list(partition_keys), list(views)],
    )
    return {key: frozenset(parts) for key, parts in rows}


def record_loaded_parts(
    conn: Connection,
    run_id: str,
    resource_type: str,
    parts: Mapping[str, Iterable[LoadedPart]],
    *,
    views: Sequence[str] | None = None,
) -> None:
    """Replace the loaded parts of partitions, by partition key. Call it in the transaction that loads them.

    ``views`` names the views that the parts were loaded into; None means all. A process that was started before a view
    was added does not name it, so that the parts are loaded into that view later.
    """
    rows = [(key, part.name, part.rows) for key in sorted(parts) for part in parts[key]]
    keys, names, counts = zip(*rows, strict=True) if rows else ((), (), ())
    conn.execute(
        """
        DELETE FROM ops.loaded_parts
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND partition_key = ANY(%s)
            AND (partition_key, part) NOT IN (SELECT * FROM unnest(%s::text[], %s::text[]))
        """,
        [resource_type, list(parts), list(keys), list(names)],
    )
    conn.execute(
        """
        INSERT INTO ops.loaded_parts AS loaded (resource_type, partition_key, part, rows, run_id, views)
        SELECT %s, key, part, rows, %s, %s::text[]
        FROM unnest(%s::text[], %s::text[], %s::bigint[]) AS new (key, part, rows)
        ON CONFLICT (resource_type, partition_key, part, source) DO UPDATE SET
            views = ARRAY(SELECT DISTINCT unnest(loaded.views || excluded.views) ORDER BY 1)
        WHERE NOT loaded.views @> excluded.views
        """,
        [resource_type, run_id, None if views is None else list(views), list(keys), list(names), list(counts)],
    )


LoadedPartRow = tuple[str, str, str, int, str, datetime, list[str] | None]
"""A row of ``ops.loaded_parts``: resource type, partition key, part, rows, run id, time of the load, views."""


def read_loaded_parts(conn: Connection) -> dict[str, list[LoadedPartRow]]:
    """Return all loaded parts by resource type."""
    rows = conn.execute(
        """
        SELECT resource_type, partition_key, part, rows, run_id, loaded_at, views
        FROM ops.loaded_parts
        WHERE source = ops.current_source()
        """
    )
    parts = defaultdict[str, list[LoadedPartRow]](list)
    for row in rows:
        parts[row[0]].append(row)
    return parts


def restore_loaded_parts(conn: Connection, parts: Sequence[LoadedPartRow]) -> None:
    """Mark parts as loaded again, except those of partitions that were loaded in the meantime."""
    with conn.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO ops.loaded_parts (resource_type, partition_key, part, rows, run_id, loaded_at, views)
            SELECT p.*
            FROM (VALUES (%s, %s, %s, %s::bigint, %s, %s::timestamptz, %s::text[])) AS p (
                resource_type, partition_key, part, rows, run_id, loaded_at, views
            )
            WHERE NOT EXISTS (
                SELECT FROM ops.loaded_parts l
                WHERE l.source = ops.current_source()
                    AND l.resource_type = p.resource_type
                    AND l.partition_key = p.partition_key
                    AND l.run_id <> p.run_id
            )
            ON CONFLICT DO NOTHING
            """,
            parts,
        )


def remove_loaded_parts(conn: Connection, resource_type: str) -> None:
    """Mark every part of a type as not loaded, so that the next load of each window loads all of it."""
    conn.execute(
        "DELETE FROM ops.loaded_parts WHERE source = ops.current_source() AND resource_type = %s", [resource_type]
    )
