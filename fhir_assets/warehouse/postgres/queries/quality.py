"""Counts for the asset checks of a resource type: dead letters, volumes and duplicates.

The functions return no rows of the tables. Counts of references are in ``references``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from fhir_assets.fhir.views import View
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables.layout import get_key_column

MAX_RULES = 10
"""The number of combinations of stage, rule and path of a window that are counted separately."""


@dataclass(frozen=True, slots=True)
class RuleCount:
    """The number of dead letters of a window with this rule and path. Equal resources are counted separately."""

    stage: str
    rule: str
    path: str
    dead_letters: int


def count_unresolved_dead_letters(
    conn: Connection, resource_type: str, partition_keys: Sequence[str]
) -> dict[str, list[RuleCount]]:
    """Count the dead letters that are neither resolved nor discarded, by partition key.

    A window has at most ``MAX_RULES`` counts, the largest first, and one count of all other dead letters, with the rule
    ``…``.
    """
    # The path of stage fetch is a position in a file or a response. The positions of a file are counted together.
    rows = conn.execute(
        """
        WITH counted AS (
            SELECT
                partition_key,
                stage,
                rule,
                CASE stage WHEN 'fetch' THEN regexp_replace(path, '[:,].*$', '') ELSE path END AS path,
                sum(occurrences)::bigint AS dead_letters
            FROM ops.dead_letters
            WHERE source = ops.current_source()
                AND resource_type = %(type)s
                AND stage IN ('fetch', 'validate', 'transform', 'load')
                AND partition_key = ANY(%(keys)s)
                AND status IN ('open', 'replaying')
            GROUP BY 1, 2, 3, 4
        ),
        ranked AS (
            SELECT
                *,
                row_number() OVER (PARTITION BY partition_key ORDER BY dead_letters DESC, rule, path) AS n
            FROM counted
        )
        SELECT partition_key, stage, rule, path, dead_letters
        FROM ranked
        WHERE n <= %(max_rules)s
        UNION ALL
        SELECT partition_key, '', '…', '', sum(dead_letters)::bigint
        FROM ranked
        WHERE n > %(max_rules)s
        GROUP BY 1
        ORDER BY 1, 5 DESC
        """,
        {"type": resource_type, "keys": list(partition_keys), "max_rules": MAX_RULES},
    )
    counts: dict[str, list[RuleCount]] = {}
    for key, *rule in rows:
        counts.setdefault(key, []).append(RuleCount(*rule))
    return counts


def count_loaded_resources(conn: Connection, resource_type: str, first: str, last: str) -> dict[str, int]:
    """Return how many resources were loaded from each window between two partition keys, without empty windows."""
    rows = conn.execute(
        """
        SELECT partition_key, sum(rows)::bigint
        FROM ops.loaded_parts
        WHERE source = ops.current_source()
            AND resource_type = %s
            AND partition_key BETWEEN %s AND %s
        GROUP BY 1
        """,
        [resource_type, first, last],
    )
    return dict(rows.fetchall())


def count_duplicates(conn: Connection, view: View) -> int:
    """Return the number of resources that have more than one row in ``view``, the main view of their type."""
    query = sql.SQL("""
        SELECT count(*)
        FROM (SELECT FROM fhir.{view} GROUP BY {key} HAVING count(*) > 1) duplicates
    """).format(view=sql.Identifier(view.name), key=sql.Identifier(get_key_column(view)))
    row = conn.execute(query).fetchone()
    return int(row[0]) if row else 0
