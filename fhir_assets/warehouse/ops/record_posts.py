"""``ops.record_posts`` and ``ops.posted_resources``: posts of records to the API, and what became of their resources.

The rows are written in the transaction that receives the resources. `fhir-assets prune` deletes old ones.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from psycopg.rows import class_row

from fhir_assets.warehouse.postgres.db.connections import Connection

ResourceKey = tuple[str, str]
"""The type and the id of a resource."""


@dataclass(frozen=True, slots=True)
class RecordPost:
    """A post: ``rejected`` of its ``records`` were refused immediately, ``origin`` has the resources of the others."""

    task_id: str
    origin: str
    records: int
    rejected: int
    posted_by: str


@dataclass(frozen=True, slots=True)
class RecordPostState:
    """The state of the resources of a post.

    While a window with some of them ``waits`` to be loaded, the tables may show earlier versions, and ``loaded``,
    ``withheld`` and ``dead_letters`` are None. ``withheld`` counts the resources that consent withholds now, and
    ``dead_letters`` those that are neither in the tables nor withheld because they became dead letters. ``run_ids`` are
    the runs that loaded the windows.
    """

    waits: bool
    resources: int
    loaded: int | None
    withheld: int | None
    dead_letters: int | None
    run_ids: tuple[str, ...]


def record(conn: Connection, post: RecordPost, resources: Sequence[ResourceKey]) -> None:
    """Record a post with its resources, in the transaction that receives them."""
    conn.execute(
        """
        INSERT INTO ops.record_posts (task_id, origin, records, rejected, posted_by)
        VALUES (%s, %s, %s, %s, %s)
        """,
        [post.task_id, post.origin, post.records, post.rejected, post.posted_by],
    )
    conn.execute(
        """
        INSERT INTO ops.posted_resources (task_id, resource_type, id)
        SELECT DISTINCT %s, resource_type, id
        FROM unnest(%s::text[], %s::text[]) AS posted (resource_type, id)
        """,
        [post.task_id, *_split(resources)],
    )


def get(conn: Connection, task_id: str) -> RecordPost | None:
    """Return the post of a task, None for an unknown id."""
    with conn.cursor(row_factory=class_row(RecordPost)) as cursor:
        return cursor.execute(
            """
            SELECT task_id, origin, records, rejected, posted_by
            FROM ops.record_posts
            WHERE source = ops.current_source() AND task_id = %s
            """,
            [task_id],
        ).fetchone()


def get_state(conn: Connection, post: RecordPost) -> RecordPostState:
    """Return the state of the resources of a post, now."""
    windows = conn.execute(
        """
        SELECT DISTINCT loaded_at IS NULL, loaded_run_id
        FROM ops.received
        WHERE source = ops.current_source()
            AND origin = %(origin)s
            AND resource_type IN (
                SELECT resource_type
                FROM ops.posted_resources
                WHERE source = ops.current_source() AND task_id = %(task)s
            )
        """,
        {"origin": post.origin, "task": post.task_id},
    ).fetchall()
    # After the windows: a load that ends in between is then still waited for.
    rows = conn.execute(
        """
        SELECT p.resource_type, p.id, w.id IS NOT NULL, r.id IS NOT NULL
        FROM ops.posted_resources p
        LEFT JOIN ops.withheld w USING (source, resource_type, id)
        LEFT JOIN fhir.resource r
            ON r.source = p.source AND r.resource_type = p.resource_type AND r.id = p.id AND r.deleted_at IS NULL
        WHERE p.source = ops.current_source() AND p.task_id = %s
        """,
        [post.task_id],
    ).fetchall()
    run_ids = tuple(sorted({run_id for _, run_id in windows if run_id}))
    if any(waits for waits, _ in windows):
        return RecordPostState(True, len(rows), None, None, None, run_ids)
    missing = [(name, key) for name, key, withheld, loaded in rows if not (withheld or loaded)]
    return RecordPostState(
        waits=False,
        resources=len(rows),
        loaded=sum(loaded and not withheld for _, _, withheld, loaded in rows),
        withheld=sum(withheld for _, _, withheld, _ in rows),
        dead_letters=_count_dead(conn, missing) if missing else 0,
        run_ids=run_ids,
    )


def find_known(conn: Connection, resources: Iterable[ResourceKey]) -> set[ResourceKey]:
    """Return those of the resources that are in the tables, withheld, or in an earlier post that is not loaded yet."""
    ids_by_type = defaultdict[str, list[str]](list)
    for name, key in resources:
        ids_by_type[name].append(key)
    known: set[ResourceKey] = set()
    # One statement for each type, which the partitions of fhir.resource are selected by.
    for name, ids in ids_by_type.items():
        rows = conn.execute(
            """
            SELECT id
            FROM fhir.resource
            WHERE source = ops.current_source()
                AND resource_type = %(type)s AND id = ANY(%(ids)s) AND deleted_at IS NULL
            UNION
            SELECT id
            FROM ops.withheld
            WHERE source = ops.current_source() AND resource_type = %(type)s AND id = ANY(%(ids)s)
            UNION
            SELECT id
            FROM ops.posted_resources
            JOIN ops.record_posts USING (source, task_id)
            JOIN ops.received USING (source, origin, resource_type)
            WHERE source = ops.current_source()
                AND resource_type = %(type)s AND id = ANY(%(ids)s) AND loaded_at IS NULL
            """,
            {"type": name, "ids": ids},
        )
        known.update((name, key) for (key,) in rows)
    return known


def _count_dead(conn: Connection, resources: Sequence[ResourceKey]) -> int:
    """Count those of the resources that have a dead letter that is not resolved."""
    row = conn.execute(
        """
        SELECT count(DISTINCT (resource_type, resource_id))
        FROM ops.dead_letters
        JOIN unnest(%s::text[], %s::text[]) AS missing (resource_type, id) USING (resource_type)
        WHERE source = ops.current_source() AND resource_id = missing.id AND status <> 'resolved'
        """,
        [*_split(resources)],
    ).fetchone()
    return int(row[0]) if row else 0


def _split(resources: Iterable[ResourceKey]) -> tuple[list[str], list[str]]:
    """Return the types and the ids as two lists, as ``unnest`` takes them."""
    pairs = list(resources)
    return [name for name, _ in pairs], [key for _, key in pairs]
