"""Updates of the planner's statistics of tables, after loads that changed many rows.

Autovacuum updates the statistics only minutes after a load. Until then, Postgres plans queries on a table that was just
filled as if the table were empty. The load does not wait for the statistics of all columns: those of the columns that
have an index, by which queries join and filter, take a fraction of the time. Autovacuum completes them.
"""

from collections.abc import Mapping

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection

MIN_ROWS = 10_000
"""The minimum number of rows that a load must have written to a table."""

_STATISTICS_TARGET = 25
"""A quarter of Postgres's default: a sample of 7,500 rows."""

MIN_SHARE = 0.1
"""The minimum share of the table's rows that a load must have written: the default of autovacuum."""


def analyze_changed(conn: Connection, rows_by_view: Mapping[str, int]) -> list[str]:
    """Analyze the tables to which a load wrote many rows, each in a transaction of its own. Return their names.

    ``rows_by_view`` has the numbers of rows that the load wrote. No statement is executed if all of them are small.
    """
    written = {name: rows for name, rows in rows_by_view.items() if rows >= MIN_ROWS}
    if not written:
        return []
    tables = conn.execute(
        """
        SELECT
            c.relname,
            c.reltuples,
            array_agg(DISTINCT a.attname)
        FROM pg_class c
        JOIN pg_index i ON i.indrelid = c.oid
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY(i.indkey::smallint[])
        WHERE c.relnamespace = 'fhir'::regnamespace
            AND c.relkind = 'r'
            AND c.relname = ANY(%s)
        GROUP BY c.oid
        ORDER BY c.relname
        """,
        [list(written)],
    ).fetchall()
    conn.commit()
    changed = [(name, columns) for name, size, columns in tables if written[name] >= MIN_SHARE * size]
    for name, columns in changed:
        indexed = sql.SQL(", ").join(map(sql.Identifier, columns))
        with conn.transaction():
            conn.execute(sql.SQL("SET LOCAL default_statistics_target = {}").format(sql.Literal(_STATISTICS_TARGET)))
            conn.execute(sql.SQL("ANALYZE {} ({})").format(sql.Identifier("fhir", name), indexed))
    return [name for name, _ in changed]
