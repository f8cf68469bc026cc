"""What the checks ask the database: letters and volumes by window, references, duplicates. Counts only, no rows."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import sql

from fhir_assets.fhir.views import View
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables.layout import KEY_COLUMN

MAX_RULES = 10
"""How many rules and paths of a window are told apart."""

_KEY_OF = re.compile(r"getReferenceKey\(\s*([A-Za-z]*)\s*\)")


@dataclass(frozen=True, slots=True)
class RuleCount:
    """How many dead letters of a window a rule has at a path, equal lines counted each."""

    stage: str
    rule: str
    path: str
    letters: int


def count_unresolved_dead_letters(
    conn: Connection, resource_type: str, partition_keys: Sequence[str]
) -> dict[str, list[RuleCount]]:
    """By partition key, the dead letters that are neither resolved nor discarded: the LEADING rules, the most first.
    The rest of a window, if there is more, is under the rule ``…``.
    """
    rows = conn.execute(
        "WITH counted AS (SELECT partition_key, stage, rule,"
        # Of stage fetch a path is a place in a file or an answer: only which file matters.
        " CASE stage WHEN 'fetch' THEN regexp_replace(path, '[:,].*$', '') ELSE path END AS path,"
        " sum(occurrences)::bigint AS letters FROM ops.dead_letters"
        " WHERE resource_type = %(type)s AND stage IN ('fetch', 'validate', 'transform', 'load')"
        " AND partition_key = ANY(%(keys)s) AND status IN ('open', 'replaying') GROUP BY 1, 2, 3, 4),"
        " ranked AS (SELECT *, row_number() OVER (PARTITION BY partition_key ORDER BY letters DESC, rule, path) AS n"
        " FROM counted)"
        " SELECT partition_key, stage, rule, path, letters FROM ranked WHERE n <= %(leading)s"
        " UNION ALL SELECT partition_key, '', '…', '', sum(letters)::bigint FROM ranked WHERE n > %(leading)s"
        " GROUP BY 1 ORDER BY 1, 5 DESC",
        {"type": resource_type, "keys": list(partition_keys), "leading": MAX_RULES},
    )
    found: dict[str, list[RuleCount]] = {}
    for key, *rule in rows:
        found.setdefault(key, []).append(RuleCount(*rule))
    return found


def count_loaded_resources(conn: Connection, resource_type: str, first: str, last: str) -> dict[str, int]:
    """How many valid resources each window between two partition keys brought; windows without any are left out."""
    rows = conn.execute(
        "SELECT partition_key, sum(rows)::bigint FROM ops.loaded_parts"
        " WHERE resource_type = %s AND partition_key BETWEEN %s AND %s GROUP BY 1",
        [resource_type, first, last],
    )
    return dict(rows.fetchall())


@dataclass(frozen=True, slots=True)
class ReferenceColumn:
    """A column of a view that holds the ids of other resources; ``target`` is their type, None if it is in the
    view's column ``reference``.
    """

    view: str
    column: str
    target: str | None


def find_reference_columns(view: View) -> list[ReferenceColumn]:
    """The columns that ``getReferenceKey()`` fills."""
    names = {column.name for column in view.columns}
    found = []
    for name, path in _columns(view.definition):
        called = _KEY_OF.search(path)
        if called and name in names and (called[1] or "reference" in names):
            found.append(ReferenceColumn(view.name, name, called[1] or None))
    return found


@dataclass(frozen=True, slots=True)
class Unresolved:
    """References of some views to resources of type ``target``: how many there are, and how many lead nowhere."""

    target: str
    references: int
    missing: int


def count_references(conn: Connection, columns: Sequence[ReferenceColumn], targets: Sequence[str]) -> list[Unresolved]:
    """By target type, how many references of the columns there are and how many have no resource in the tables.
    Only types of ``targets`` count: nothing else is loaded.
    """
    found: dict[str, list[int]] = {}
    for column in columns:
        query = sql.SQL(
            "SELECT q.target, sum(q.n)::bigint, coalesce(sum(q.n) FILTER (WHERE r.id IS NULL), 0)::bigint"
            " FROM ({references}) q LEFT JOIN fhir.resource r ON r.resource_type = q.target AND r.id = q.id"
            " GROUP BY 1"
        ).format(references=_references(column))
        for target, references, missing in conn.execute(query, {"targets": list(targets)}):
            sums = found.setdefault(target, [0, 0])
            sums[0] += references
            sums[1] += missing
    return [Unresolved(target, *sums) for target, sums in sorted(found.items(), key=lambda item: -item[1][1])]


def find_missing_ids(
    conn: Connection, columns: Sequence[ReferenceColumn], target: str, *, limit: int
) -> list[tuple[str, int]]:
    """Ids of resources of type ``target`` that the columns refer to and the tables lack, none twice, with how many
    references each has in the column that named it first; at most ``limit``.
    """
    found: dict[str, int] = {}
    for column in columns:
        if column.target not in (None, target):
            continue
        query = sql.SQL(
            "SELECT q.id, q.n FROM ({references}) q WHERE NOT EXISTS"
            " (SELECT FROM fhir.resource r WHERE r.resource_type = %(target)s AND r.id = q.id)"
            " AND NOT EXISTS (SELECT FROM ops.missing_references m WHERE m.resource_type = %(target)s"
            " AND m.resource_id = q.id AND m.asked_at > now() - interval '1 day')"
            " AND q.target = %(target)s LIMIT %(limit)s"
        ).format(references=_references(column))
        params = {"targets": [target], "target": target, "limit": limit}
        for identity, count in conn.execute(query, params):
            found.setdefault(identity, count)
        if len(found) >= limit:
            break
    return list(found.items())[:limit]


def record_requests(conn: Connection, run_id: str, resource_type: str, ids: Sequence[str]) -> None:
    """Remember that these were asked for: ``missing_ids`` leaves them out for a day, or until they are loaded."""
    conn.execute(
        "INSERT INTO ops.missing_references (resource_type, resource_id, run_id) SELECT %s, id, %s FROM"
        " unnest(%s::text[]) id ON CONFLICT (resource_type, resource_id)"
        " DO UPDATE SET asked_at = now(), run_id = excluded.run_id",
        [resource_type, run_id, list(ids)],
    )


def forget_loaded_requests(conn: Connection) -> None:
    """What was asked for and is loaded by now needs no remembering, nor what was asked for long ago."""
    conn.execute(
        "DELETE FROM ops.missing_references m WHERE asked_at < now() - interval '1 day' OR EXISTS"
        " (SELECT FROM fhir.resource r WHERE r.resource_type = m.resource_type AND r.id = m.resource_id)"
    )


def _references(column: ReferenceColumn) -> sql.Composed:
    """The distinct references of a column: target, id, and how often it is referred to."""
    target: sql.Composable = sql.Literal(column.target)
    if column.target is None:
        target = sql.SQL("substring(v.reference from '([A-Za-z]+)/[^/]+(?:/_history/[^/]+)?$')")
    return sql.SQL(
        "SELECT * FROM (SELECT {target}::text AS target, v.{column} AS id, count(*) AS n FROM fhir.{view} v"
        " WHERE v.{column} IS NOT NULL GROUP BY 1, 2) counted WHERE target = ANY(%(targets)s)"
    ).format(target=target, column=sql.Identifier(column.column), view=sql.Identifier(column.view))


def count_duplicates(conn: Connection, view: View) -> int:
    """How many resources have more than one row in the main table of their type."""
    query = sql.SQL("SELECT count(*) FROM (SELECT FROM fhir.{} GROUP BY {} HAVING count(*) > 1) twice").format(
        sql.Identifier(view.name), sql.Identifier(KEY_COLUMN)
    )
    row = conn.execute(query).fetchone()
    return int(row[0]) if row else 0


def existing_tables(conn: Connection, views: Sequence[View]) -> frozenset[str]:
    """The names of those views whose table is there."""
    rows = conn.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'fhir'::regnamespace AND relname = ANY(%s)",
        [[view.name for view in views]],
    )
    return frozenset(name for (name,) in rows)


def _columns(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for column in node.get("column", ()):
        yield column.get("name", ""), column.get("path", "")
    for child in (*node.get("select", ()), *node.get("unionAll", ())):
        yield from _columns(child)
