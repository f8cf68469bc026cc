"""The statistics of tables that a load changed, from which Postgres plans queries.

Autovacuum updates them, too, up to minutes after the load: until then queries of a table that has just been filled
run with the plans of an empty one. What is analyzed here autovacuum need not analyze again.
"""

from collections.abc import Mapping

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection

MIN_ROWS = 10_000
"""The rows that a load must have written to a table."""

MIN_SHARE = 0.1
"""The share of the table's rows that a load must have written, as of autovacuum by default."""


def analyze_changed(conn: Connection, rows_by_view: Mapping[str, int]) -> list[str]:
    """Analyze the tables of which a load wrote much, each in a transaction of its own. Return their names.

    ``rows_by_view`` are the rows that it wrote. A load that wrote little costs no statement.
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
