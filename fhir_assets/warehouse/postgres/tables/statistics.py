"""Updates of the planner's statistics of tables, after loads that changed many rows.

Autovacuum updates the statistics only minutes after a load. Until then, Postgres plans queries on a table that was just
filled as if the table were empty.
"""

from collections.abc import Mapping

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection

MIN_ROWS = 10_000
"""The minimum number of rows that a load must have written to a table."""

MIN_SHARE = 0.1
"""The minimum share of the table's rows that a load must have written: the default of autovacuum."""


def analyze_changed(conn: Connection, rows_by_view: Mapping[str, int]) -> list[str]:
    """Analyze the tables to which a load wrote many rows, each in a transaction of its own. Return their names.

    ``rows_by_view`` has the numbers of rows that the load wrote. No statement is executed if all of them are small.
    """
    written = {name: rows for name, rows in rows_by_view.items() if rows >= MIN_ROWS}
    if not written:
        return []
    sizes = conn.execute(
        """
        SELECT relname, reltuples
        FROM pg_class
        WHERE relnamespace = 'fhir'::regnamespace
            AND relkind = 'r'
            AND relname = ANY(%s)
        ORDER BY relname
        """,
        [list(written)],
    ).fetchall()
    conn.commit()
    changed = [name for name, size in sizes if written[name] >= MIN_SHARE * size]
    for name in changed:
        with conn.transaction():
            conn.execute(sql.SQL("ANALYZE {}").format(sql.Identifier("fhir", name)))
    return changed
