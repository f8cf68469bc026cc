"""Searches samples of the tables for patient data that should be encrypted but is not.

Postgres tests the values; this module reads only counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from fhir_assets.fhir.views import View
from fhir_assets.warehouse.postgres.db import resource_partitions
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables.layout import (
    BLIND_INDEX_SUFFIX,
    PARTIAL_DATE_KINDS,
    PhiTreatment,
    column_kind,
    has_blind_index,
    phi_treatment,
)

SAMPLE_ROWS = 10_000
SAMPLE_PAGES = 2_000

_IS_NOT_TOKEN = sql.SQL("{} !~ '^(gAAAAA[-_A-Za-z0-9]{{90,}}={{0,2}}|fs2_[-_A-Za-z0-9]{{43,}})$'")
_IS_NOT_HASH = sql.SQL("{} !~ '^[0-9a-f]{{64}}$'")
_IS_NOT_YEAR = sql.SQL("to_char({} AT TIME ZONE 'UTC', 'MM-DD') <> '01-01'")
_IS_NOT_NULL = sql.SQL("{} IS NOT NULL")


@dataclass(frozen=True, slots=True)
class ColumnSample:
    """A sampled column of a table in schema ``fhir``.

    ``values`` is the number of values in the sample that are not null, ``plain`` the number of unencrypted ones.
    """

    table: str
    column: str
    values: int
    plain: int


def scan_view(conn: Connection, view: View) -> list[ColumnSample]:
    """Sample the columns of a view's table that are tagged ``phi``, and count the values that lack the treatment."""
    tests: dict[str, sql.Composed] = {}
    for column in view.columns:
        phi = phi_treatment(column, encrypted=True)
        name = sql.Identifier(column.name)
        if phi is PhiTreatment.ENCRYPT:
            tests[column.name] = _IS_NOT_TOKEN.format(name)
            if has_blind_index(column):
                index = f"{column.name}{BLIND_INDEX_SUFFIX}"
                tests[index] = _IS_NOT_HASH.format(sql.Identifier(index))
        elif phi is PhiTreatment.HASH:
            tests[column.name] = _IS_NOT_HASH.format(name)
        elif phi is PhiTreatment.YEAR and column_kind(column) in PARTIAL_DATE_KINDS:
            tests[column.name] = _IS_NOT_YEAR.format(sql.SQL("{}::timestamptz").format(name))
        elif phi is PhiTreatment.DROP:
            tests[column.name] = _IS_NOT_NULL.format(name)
    return _scan_table(conn, "fhir", view.name, tests)


def scan_resources(conn: Connection, resource_type: str) -> list[ColumnSample]:
    """Sample the resources of a type in ``fhir.resource``, and count those that are not encrypted."""
    test = sql.SQL("jsonb_typeof(resource) <> 'string' OR key_id IS NULL").format()
    name = resource_partitions.partition_name(resource_type)
    return _scan_table(conn, resource_partitions.SCHEMA, name, {"resource": test})


def _scan_table(conn: Connection, schema: str, table: str, tests: dict[str, sql.Composed]) -> list[ColumnSample]:
    if not tests:
        return []
    counts = sql.SQL(", ").join(
        [
            sql.SQL("count({name}), count(*) FILTER (WHERE {name} IS NOT NULL AND ({test}))").format(
                name=sql.Identifier(name), test=test
            )
            for name, test in tests.items()
        ]
    )
    pages = conn.execute(
        "SELECT pg_relation_size(format('%%I.%%I', %s::text, %s::text)) / current_setting('block_size')::int",
        [schema, table],
    ).fetchone()
    percentage = min(100.0, 100.0 * SAMPLE_PAGES / max(1, pages[0] if pages else 1))
    query = sql.SQL("""
        SELECT {counts}
        FROM (SELECT * FROM {table} TABLESAMPLE SYSTEM ({percentage}) LIMIT {rows}) sample
    """).format(
        counts=counts,
        table=sql.Identifier(schema, table),
        percentage=sql.Literal(percentage),
        rows=sql.Literal(SAMPLE_ROWS),
    )
    numbers: Sequence[int] = conn.execute(query).fetchone() or ()
    return [ColumnSample(table, name, *numbers[2 * n : 2 * n + 2]) for n, name in enumerate(tests)]
