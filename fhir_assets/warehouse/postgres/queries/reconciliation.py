"""Counts of resources that are not in the tables, for the reconciliation of windows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg import sql

from fhir_assets.fhir.views import View
from fhir_assets.warehouse.postgres import version_order
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.queries.temporary_lines import temporary_lines
from fhir_assets.warehouse.postgres.tables.layout import get_key_column


@dataclass(frozen=True, slots=True)
class AbsentCounts:
    """The numbers of validated resources of a window that are not in the tables, by reason.

    ``deleted`` resources were deleted at the source, ``withheld`` resources are withheld by consent. The reason for
    ``missing`` resources is unknown.
    """

    missing: int = 0
    deleted: int = 0
    withheld: int = 0

    def without(self, rows: int) -> "AbsentCounts":
        """Return the counts without at most ``rows`` missing resources, which a load in progress is about to load."""
        return AbsentCounts(max(0, self.missing - rows), self.deleted, self.withheld)


def count_unloaded(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> dict[str, int]:
    """Return the number of resources whose transformation or load failed, by partition key."""
    rows = conn.execute(
        """
        SELECT partition_key, sum(occurrences)::bigint
        FROM ops.dead_letters
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND stage IN ('transform', 'load')
            AND status IN ('open', 'replaying', 'discarded')
            AND partition_key = ANY(%s)
        GROUP BY partition_key
        """,
        (resource_type, list(partition_keys)),
    )
    return dict(rows.fetchall())


def count_versions(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> dict[str, int]:
    """Return the number of resources in ``fhir.resource`` by partition key, without deleted ones."""
    rows = conn.execute(
        """
        SELECT partition_key, count(*)
        FROM fhir.resource
        WHERE source = ops.current_source()
            AND resource_type = %s AND partition_key = ANY(%s) AND deleted_at IS NULL
        GROUP BY partition_key
        """,
        (resource_type, list(partition_keys)),
    )
    return dict(rows.fetchall())


def count_absent(
    conn: Connection, resource_type: str, expected: Iterable[str], *, main_view: View | None
) -> dict[str, AbsentCounts]:
    """Return the numbers of expected resources that are not in the tables by partition key, without dead letters.

    ``expected`` yields lines in the text format of COPY: partition key, id, ``meta.lastUpdated`` if it counts, and the
    time of arrival if it is known. With ``main_view``, a resource without a row in the table of this view is counted as
    missing, too.
    """
    without_row: sql.Composable = sql.SQL("")
    if main_view:
        without_row = sql.SQL("""
            OR r.deleted_at IS NULL AND NOT EXISTS (
                SELECT FROM {table} v WHERE v._source = r.source AND v.{key} = e.id
            )
        """).format(
            table=sql.Identifier("fhir", main_view.name),
            key=sql.Identifier(get_key_column(main_view)),
        )
    query = _COUNT_ABSENT.format(
        without_row=without_row,
        is_newer=_IS_NEWER,
        is_withheld=_IS_WITHHELD,
        has_dead_letter=_HAS_DEAD_LETTER,
    )
    with temporary_lines(conn, "expected", _VERSION_COLUMNS, expected, generated=_AS_OF):
        return {key: AbsentCounts(*numbers) for key, *numbers in conn.execute(query, {"type": resource_type})}


_VERSION_COLUMNS: Mapping[str, LiteralString] = {
    "partition_key": "text",
    "id": "text",
    "last_updated": "timestamptz",
    "arrived": "timestamptz",
}
_AS_OF: Mapping[str, LiteralString] = {
    "as_of": "timestamptz GENERATED ALWAYS AS (coalesce(last_updated, arrived)) STORED"
}
_IS_NEWER = version_order.is_newer_than_stored("e", "r")
_IS_WITHHELD = sql.SQL("""
    w.source = ops.current_source()
    AND w.resource_type = %(type)s
    AND w.id = e.id
    AND w.as_of >= coalesce(e.as_of, w.as_of)
""")
"""Whether ``w`` is the version ``e`` or a newer one of the same resource."""
_HAS_DEAD_LETTER = sql.SQL("""
    EXISTS (
        SELECT FROM ops.dead_letters d
        WHERE d.source = ops.current_source()
            AND d.resource_type = %(type)s
            AND d.stage IN ('transform', 'load')
            AND d.status IN ('open', 'replaying', 'discarded')
            AND d.partition_key = e.partition_key
            AND d.resource_id IS NOT DISTINCT FROM e.id
    )
""")
"""Whether the resource ``e`` could not be transformed or loaded."""
_COUNT_ABSENT = sql.SQL("""
    SELECT
        e.partition_key,
        count(*) FILTER (WHERE w.id IS NULL AND (r.id IS NULL OR {is_newer} {without_row})),
        count(*) FILTER (WHERE w.id IS NULL AND r.deleted_at IS NOT NULL AND ({is_newer}) IS NOT TRUE),
        count(w.id)
    FROM expected e
    LEFT JOIN fhir.resource r ON r.source = ops.current_source() AND r.resource_type = %(type)s AND r.id = e.id
    LEFT JOIN ops.withheld w ON {is_withheld}
    WHERE (r.id IS NULL OR {is_newer} OR r.deleted_at IS NOT NULL {without_row})
        AND NOT {has_dead_letter}
    GROUP BY e.partition_key
""")


def count_unaccounted(conn: Connection, resource_type: str, lines: Iterable[str]) -> dict[str, int]:
    """Return the numbers of received resources that are in no table and no dead letter, by partition key.

    ``lines`` yields lines in the text format of COPY: partition key, id, ``meta.lastUpdated`` if it counts, the time of
    arrival if it is known, and the fingerprint of the dead letter of stage ``validate`` that the resource would be.
    """
    columns: dict[str, LiteralString] = {**_VERSION_COLUMNS, "fingerprint": "bytea"}
    with temporary_lines(conn, "received", columns, lines, generated=_AS_OF):
        return dict(conn.execute(_COUNT_UNACCOUNTED, {"type": resource_type}).fetchall())


_COUNT_UNACCOUNTED = sql.SQL("""
    SELECT e.partition_key, count(*)
    FROM received e
    LEFT JOIN fhir.resource r ON r.source = ops.current_source() AND r.resource_type = %(type)s AND r.id = e.id
    WHERE (r.id IS NULL OR {is_newer})
        AND NOT EXISTS (
            SELECT FROM ops.dead_letters d
            WHERE d.source = ops.current_source()
                AND d.fingerprint = e.fingerprint
                AND (
                    d.status IN ('open', 'replaying', 'discarded')
                    OR d.resolution = 'corrected' AND d.resource_id IS NULL
                )
        )
        AND NOT {has_dead_letter}
        AND NOT EXISTS (SELECT FROM ops.withheld w WHERE {is_withheld})
    GROUP BY e.partition_key
""").format(is_newer=_IS_NEWER, is_withheld=_IS_WITHHELD, has_dead_letter=_HAS_DEAD_LETTER)
