"""Is what should be sealed sealed? Asked of a sample, in the database: no value leaves it."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from fhir_assets.catalog import BY_NAME
from fhir_assets.fhir.views import View
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
_SAMPLE_PAGES = 2_000

_TOKEN = sql.SQL("{} !~ '^gAAAAA[-_A-Za-z0-9]{{90,}}={{0,2}}$'")
_HASH = sql.SQL("{} !~ '^[0-9a-f]{{64}}$'")
_YEAR = sql.SQL("to_char({} AT TIME ZONE 'UTC', 'MM-DD') <> '01-01'")
_NOTHING = sql.SQL("{} IS NOT NULL")


@dataclass(frozen=True, slots=True)
class ColumnSample:
    """A column of a table in schema ``fhir``: of ``values`` that were looked at so many are ``plain``."""

    table: str
    column: str
    values: int
    plain: int


def scan_view(conn: Connection, view: View) -> list[ColumnSample]:
    """The columns of a view's table that hold patient data: tokens, hashes, years and nothing, as they are tagged."""
    tests: dict[str, sql.Composed] = {}
    for column in view.columns:
        phi = phi_treatment(column, encrypted=True)
        name = sql.Identifier(column.name)
        if phi is PhiTreatment.ENCRYPT:
            tests[column.name] = _TOKEN.format(name)
            if has_blind_index(column):
                index = f"{column.name}{BLIND_INDEX_SUFFIX}"
                tests[index] = _HASH.format(sql.Identifier(index))
        elif phi is PhiTreatment.HASH:
            tests[column.name] = _HASH.format(name)
        elif phi is PhiTreatment.YEAR and column_kind(column) in PARTIAL_DATE_KINDS:
            tests[column.name] = _YEAR.format(sql.SQL("{}::timestamptz").format(name))
        elif phi is PhiTreatment.DROP:
            tests[column.name] = _NOTHING.format(name)
    return _sampled(conn, view.name, tests)


def scan_resources(conn: Connection, resource_type: str) -> list[ColumnSample]:
    """The whole resources of a type."""
    known = BY_NAME.get(resource_type)
    test = sql.SQL("jsonb_typeof(resource) <> 'string' OR key_id IS NULL").format()
    return _sampled(conn, f"resource_{known.key}" if known else "resource_other", {"resource": test})


def _sampled(conn: Connection, table: str, tests: dict[str, sql.Composed]) -> list[ColumnSample]:
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
        "SELECT pg_relation_size(format('fhir.%%I', %s::text)) / current_setting('block_size')::int", [table]
    ).fetchone()
    share = min(100.0, 100.0 * _SAMPLE_PAGES / max(1, pages[0] if pages else 1))
    query = sql.SQL("SELECT {} FROM (SELECT * FROM {} TABLESAMPLE SYSTEM ({}) LIMIT {}) sample").format(
        counts, sql.Identifier("fhir", table), sql.Literal(share), sql.Literal(SAMPLE_ROWS)
    )
    found: Sequence[int] = conn.execute(query).fetchone() or ()
    return [ColumnSample(table, name, *found[2 * n : 2 * n + 2]) for n, name in enumerate(tests)]
