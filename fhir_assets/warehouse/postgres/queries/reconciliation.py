"""Counts of resources that are not in the tables, for the reconciliation of windows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from psycopg import sql

from fhir_assets.warehouse.postgres import version_order
from fhir_assets.warehouse.postgres.db.connections import Connection

_LINES_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class AbsentCounts:
    """The numbers of validated resources of a window that are not in the tables, by reason.

    ``deleted`` resources were deleted at the source, ``withheld`` resources are withheld by consent. For ``missing``
    resources no reason is known.
    """

    missing: int = 0
    deleted: int = 0
    withheld: int = 0


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
    conn: Connection, resource_type: str, expected: Iterable[str], *, main_view: str | None
) -> dict[str, AbsentCounts]:
    """Return the numbers of expected resources that are not in the tables by partition key, without dead letters.

    ``expected`` yields lines in the text format of COPY: partition key, id, ``meta.lastUpdated`` if it counts, and the
    time of arrival if it is known. With
    ``main_view``, a resource without a row in the table of this view is counted as missing, too.
    """
    conn.execute(
        """
        CREATE TEMPORARY TABLE expected (
            partition_key text,
            id text,
            last_updated timestamptz,
            arrived timestamptz,
            as_of timestamptz GENERATED ALWAYS AS (coalesce(last_updated, arrived)) STORED
        )
        ON COMMIT DROP
        """
    )
    lines = iter(expected)
    with conn.cursor().copy("COPY expected (partition_key, id, last_updated, arrived) FROM STDIN") as copy:
        while block := "".join(islice(lines, _LINES_AT_ONCE)):
            copy.write(block)
    # Without statistics, Postgres estimates a few rows even for a million, and chooses an index scan for each id.
    conn.execute("ANALYZE expected")
    without_row: sql.Composable = sql.SQL("")
    if main_view:
        without_row = sql.SQL("""
            OR r.deleted_at IS NULL AND NOT EXISTS (
                SELECT FROM {} v WHERE v._source = r.source AND v._resource_key = e.id
            )
        """).format(sql.Identifier("fhir", main_view))
    query = _COUNT_ABSENT.format(without_row=without_row, is_newer=version_order.is_newer_than_stored("e", "r"))
    counts = {key: AbsentCounts(*numbers) for key, *numbers in conn.execute(query, {"type": resource_type})}
    conn.execute("DROP TABLE expected")
    return counts


_COUNT_ABSENT = sql.SQL("""
    SELECT
        e.partition_key,
        count(*) FILTER (WHERE w.id IS NULL AND (r.id IS NULL OR {is_newer} {without_row})),
        count(*) FILTER (WHERE w.id IS NULL AND r.deleted_at IS NOT NULL AND ({is_newer}) IS NOT TRUE),
        count(w.id)
    FROM expected e
    LEFT JOIN fhir.resource r ON r.source = ops.current_source() AND r.resource_type = %(type)s AND r.id = e.id
    LEFT JOIN ops.withheld w
        ON w.source = ops.current_source()
        AND w.resource_type = %(type)s
        AND w.id = e.id
        AND w.as_of >= coalesce(e.as_of, w.as_of)
    WHERE (r.id IS NULL OR {is_newer} OR r.deleted_at IS NOT NULL {without_row})
        AND NOT EXISTS (
            SELECT FROM ops.dead_letters d
            WHERE d.source = ops.current_source()
                AND d.resource_type = %(type)s
                AND d.stage IN ('transform', 'load')
                AND d.status IN ('open', 'replaying', 'discarded')
                AND d.partition_key = e.partition_key
                AND d.resource_id IS NOT DISTINCT FROM e.id
        )
    GROUP BY e.partition_key
""")


def count_unaccounted(conn: Connection, resource_type: str, lines: Iterable[str]) -> dict[str, int]:
    """Return the numbers of received resources that are in no table and no dead letter, by partition key.

    ``lines`` yields lines in the text format of COPY: partition key, id, ``meta.lastUpdated`` if it counts, the time of
    arrival if it is known, and the fingerprint of the dead letter of stage ``validate`` that the resource would be.
    """
    conn.execute(
        """
        CREATE TEMPORARY TABLE received (
            partition_key text,
            id text,
            last_updated timestamptz,
            arrived timestamptz,
            fingerprint bytea,
            as_of timestamptz GENERATED ALWAYS AS (coalesce(last_updated, arrived)) STORED
        )
        ON COMMIT DROP
        """
    )
    remaining = iter(lines)
    columns = "received (partition_key, id, last_updated, arrived, fingerprint)"
    with conn.cursor().copy(f"COPY {columns} FROM STDIN") as copy:
        while block := "".join(islice(remaining, _LINES_AT_ONCE)):
            copy.write(block)
    conn.execute("ANALYZE received")
    counts: dict[str, int] = dict(conn.execute(_COUNT_UNACCOUNTED, {"type": resource_type}).fetchall())
    conn.execute("DROP TABLE received")
    return counts


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
        AND NOT EXISTS (
            SELECT FROM ops.dead_letters d
            WHERE d.source = ops.current_source()
                AND d.resource_type = %(type)s
                AND d.stage IN ('transform', 'load')
                AND d.status IN ('open', 'replaying', 'discarded')
                AND d.partition_key = e.partition_key
                AND d.resource_id IS NOT DISTINCT FROM e.id
        )
        AND NOT EXISTS (
            SELECT FROM ops.withheld w
            WHERE w.source = ops.current_source()
                AND w.resource_type = %(type)s
                AND w.id = e.id
                AND w.as_of >= coalesce(e.as_of, w.as_of)
        )
    GROUP BY e.partition_key
""").format(is_newer=version_order.is_newer_than_stored("e", "r"))
