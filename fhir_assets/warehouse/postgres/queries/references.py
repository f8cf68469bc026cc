"""References between resources in the tables: counts them, and finds ids of referenced resources that are missing."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from fhir_assets.fhir.views.row_identity import ReferenceColumn
from fhir_assets.warehouse.postgres.db.connections import Connection


@dataclass(frozen=True, slots=True)
class ReferenceCounts:
    """The number of references to resources of type ``target``; ``missing`` of them have no resource in the tables."""

    target: str
    references: int
    missing: int


def count_references(
    conn: Connection, columns: Sequence[ReferenceColumn], targets: Sequence[str]
) -> list[ReferenceCounts]:
    """Count the references in ``columns`` by target type. The type with the most missing references comes first.

    Only the types in ``targets`` are counted, because resources of other types are not loaded.
    """
    counts: dict[str, list[int]] = {}
    for column in columns:
        query = sql.SQL("""
            SELECT q.target, sum(q.n)::bigint, coalesce(sum(q.n) FILTER (WHERE r.id IS NULL), 0)::bigint
            FROM ({references}) q
            LEFT JOIN fhir.resource r
                ON r.source = ops.current_source() AND r.resource_type = q.target AND r.id = q.id
            GROUP BY 1
        """).format(references=_select_references(column))
        for target, references, missing in conn.execute(query, {"targets": list(targets)}):
            sums = counts.setdefault(target, [0, 0])
            sums[0] += references
            sums[1] += missing
    return [ReferenceCounts(target, *sums) for target, sums in sorted(counts.items(), key=lambda item: -item[1][1])]


def count_keyless(conn: Connection, resource_type: str) -> list[tuple[str, int]]:
    """Return the number of resources of a type with references that have no key, by ``form`` or ``form Type``.

    The most frequent form comes first. The forms are those of ``fhir/references.py``.
    """
    return conn.execute(
        """
        SELECT form, count(*)
        FROM fhir.resource
        CROSS JOIN unnest(keyless) AS form
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND keyless <> '{}'
            AND resource IS NOT NULL
        GROUP BY form
        ORDER BY count(*) DESC, form
        """,
        [resource_type],
    ).fetchall()


def find_missing_ids(
    conn: Connection, columns: Sequence[ReferenceColumn], target: str, *, limit: int
) -> list[tuple[str, int]]:
    """Return at most ``limit`` ids of resources of type ``target`` that are referenced but not in the tables.

    Each id is paired with the number of references in the first column that contains it. Ids that were requested
    within the last day are left out.
    """
    counts: dict[str, int] = {}
    for column in columns:
        if column.target not in (None, target):
            continue
        query = sql.SQL("""
            SELECT q.id, q.n
            FROM ({references}) q
            WHERE NOT EXISTS (
                    SELECT FROM fhir.resource r
                    WHERE r.source = ops.current_source() AND r.resource_type = %(target)s AND r.id = q.id
                )
                AND NOT EXISTS (
                    SELECT FROM ops.missing_references m
                    WHERE m.source = ops.current_source()
                        AND m.resource_type = %(target)s
                        AND m.resource_id = q.id
                        AND m.asked_at > now() - interval '1 day'
                )
                AND q.target = %(target)s
            LIMIT %(limit)s
        """).format(references=_select_references(column))
        params = {"targets": [target], "target": target, "limit": limit}
        for resource_id, count in conn.execute(query, params):
            counts.setdefault(resource_id, count)
        if len(counts) >= limit:
            break
    return list(counts.items())[:limit]


def record_requests(conn: Connection, run_id: str, resource_type: str, ids: Sequence[str]) -> None:
    """Record that resources were requested from the server. ``find_missing_ids`` leaves them out for a day."""
    conn.execute(
        """
        INSERT INTO ops.missing_references (resource_type, resource_id, run_id)
        SELECT %s, id, %s
        FROM unnest(%s::text[]) id
        ON CONFLICT (resource_type, resource_id, source) DO UPDATE SET
            asked_at = now(),
            run_id = excluded.run_id
        """,
        [resource_type, run_id, list(ids)],
    )


def forget_loaded_requests(conn: Connection) -> None:
    """Delete the records of requests that are older than a day or whose resources are loaded."""
    conn.execute(
        """
        DELETE FROM ops.missing_references m
        WHERE asked_at < now() - interval '1 day'
            OR EXISTS (
                SELECT FROM fhir.resource r
                WHERE r.source = m.source AND r.resource_type = m.resource_type AND r.id = m.resource_id
            )
        """
    )


def _select_references(column: ReferenceColumn) -> sql.Composed:
    """Return a query for the distinct references in a column: target type, id and number of references."""
    target: sql.Composable = sql.Literal(column.target)
    if column.target is None:
        target = sql.SQL("substring(v.reference from '([A-Za-z]+)/[^/]+(?:/_history/[^/]+)?$')")
    return sql.SQL("""
        SELECT *
        FROM (
            SELECT {target}::text AS target, v.{column} AS id, count(*) AS n
            FROM fhir.{view} v
            WHERE v._source = ops.current_source() AND v.{column} IS NOT NULL
            GROUP BY 1, 2
        ) counted
        WHERE target = ANY(%(targets)s)
    """).format(target=target, column=sql.Identifier(column.column), view=sql.Identifier(column.view))
