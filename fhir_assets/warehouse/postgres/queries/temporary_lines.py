"""Lines in a temporary table, so that a query can compare them with the tables."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import LiteralString

from psycopg import sql

from fhir_assets.warehouse.postgres.db.connections import Connection

_LINES_PER_WRITE = 1000


@contextmanager
def temporary_lines(
    conn: Connection,
    table: str,
    columns: Mapping[str, LiteralString],
    lines: Iterable[str],
    *,
    generated: Mapping[str, LiteralString] | None = None,
) -> Iterator[None]:
    """Create a temporary table with lines in the text format of COPY, and drop it at the end of the block.

    ``columns`` and ``generated`` are types by name; columns of ``generated`` are not in the lines. If the block raises
    an error, the end of the transaction drops the table.
    """
    name = sql.Identifier(table)
    definitions = [
        sql.SQL("{} {}").format(sql.Identifier(column), sql.SQL(type_))
        for column, type_ in {**columns, **(generated or {})}.items()
    ]
    conn.execute(sql.SQL("CREATE TEMPORARY TABLE {} ({}) ON COMMIT DROP").format(name, sql.SQL(", ").join(definitions)))
    copied = sql.SQL(", ").join(map(sql.Identifier, columns))
    remaining = iter(lines)
    with conn.cursor().copy(sql.SQL("COPY {} ({}) FROM STDIN").format(name, copied)) as copy:
        while block := "".join(islice(remaining, _LINES_PER_WRITE)):
            copy.write(block)
    # Without statistics, Postgres estimates a few rows for any table, and chooses an index scan for each line.
    conn.execute(sql.SQL("ANALYZE {}").format(name))
    yield
    conn.execute(sql.SQL("DROP TABLE {}").format(name))
