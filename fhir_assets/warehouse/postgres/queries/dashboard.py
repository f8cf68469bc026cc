"""The counts of the dashboard. No row names a patient, and groups of few patients are left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString

import psycopg
from psycopg import sql

from fhir_assets.catalog import CATALOG
from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db.connections import Connection

SMALLEST_GROUP = 5
"""Patients in the smallest group that is shown: a count of one rare condition could point to a person."""


@dataclass(frozen=True)
class Panel:
    """A part of the dashboard: its query, and the tables and views that the query reads."""

    name: str
    relations: tuple[str, ...]
    statement: LiteralString | sql.Composed


@dataclass(frozen=True)
class Answer:
    """The rows of a panel, and the names of their columns."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[object, ...]]


def _measure_completeness(table: str, *columns: str) -> Panel:
    """Return the panel of how many rows of a table of schema fhir state each of some columns."""
    values = (sql.SQL("({}, t.{}::text)").format(column, sql.Identifier(column)) for column in columns)
    statement = sql.SQL(
        """
        SELECT
            {name} AS "table",
            count(*) AS "rows",
            c.name AS "column",
            count(c.value) AS stated,
            coalesce(round(100.0 * count(c.value) / nullif(count(*), 0)) || '%%', '') AS share
        FROM {table} t
        CROSS JOIN LATERAL (VALUES {values}) AS c (name, value)
        GROUP BY c.name
        ORDER BY c.name
        """
    ).format(name=table, table=sql.Identifier("fhir", table), values=sql.SQL(", ").join(values))
    return Panel(f"completeness of {table}s", (f"fhir.{table}",), statement)


def _measure_freshness(table: str, resource_type: str) -> Panel:
    """Return the panel of how many resources of a type are loaded, and how new they are.

    The main table of a type has a row for each resource. The panel does not read ``fhir.resource``, as readers may not.
    """
    statement = sql.SQL(
        """
        SELECT {resource_type} AS type, count(*) AS resources, max(last_updated) AS newest, max(loaded_at) AS loaded
        FROM {table}
        HAVING count(*) > 0
        """
    ).format(resource_type=resource_type, table=sql.Identifier("fhir", table))
    return Panel(f"freshness of {table}", (f"fhir.{table}",), statement)


POPULATION = Panel(
    "population",
    ("marts.patient_current",),
    """
    SELECT
        coalesce(gender, 'not stated') AS gender,
        CASE
            WHEN age IS NULL THEN 'not stated'
            WHEN age >= 90 THEN '90 and older'
            ELSE format('%%s to %%s', lpad((age / 10 * 10)::text, 2, '0'), lpad((age / 10 * 10 + 9)::text, 2, '0'))
        END AS age,
        count(*) AS patients
    FROM marts.patient_current
    WHERE alive
    GROUP BY 1, 2
    HAVING count(*) >= %(smallest)s
    ORDER BY 2, 1
    """,
)
CONDITIONS = Panel(
    "conditions",
    ("marts.condition_current",),
    """
    SELECT
        coalesce(max(code_display), code) AS condition,
        count(DISTINCT (_source, patient_key)) FILTER (WHERE patient_key IS NOT NULL) AS patients
    FROM marts.condition_current
    WHERE code IS NOT NULL
    GROUP BY code_system, code
    HAVING count(DISTINCT (_source, patient_key)) FILTER (WHERE patient_key IS NOT NULL) >= %(smallest)s
    ORDER BY 2 DESC, 1
    LIMIT 20
    """,
)
ENCOUNTERS = Panel(
    "encounters",
    ("marts.encounter_valid",),
    """
    SELECT
        to_char(period_start_date, 'YYYY-MM') AS month,
        coalesce(class_display, class_code, 'not stated') AS class,
        count(*) AS encounters
    FROM marts.encounter_valid
    WHERE period_start_date >= (
        SELECT date_trunc('month', max(period_start_date)) - INTERVAL '5 years'
        FROM marts.encounter_valid
        WHERE period_start_date <= current_date
    )
    GROUP BY 1, 2
    HAVING count(DISTINCT (_source, patient_key)) FILTER (WHERE patient_key IS NOT NULL) >= %(smallest)s
    ORDER BY 1, 2
    """,
)
LABS = Panel(
    "labs",
    ("marts.observation_valid",),
    """
    SELECT
        coalesce(max(code_display), code) AS test,
        coalesce(value_quantity_unit, '') AS unit,
        count(*) AS results,
        count(DISTINCT (_source, patient_key)) FILTER (WHERE patient_key IS NOT NULL) AS patients,
        max(effective_start_date) AS newest
    FROM marts.observation_valid
    WHERE category_code = 'laboratory' AND code IS NOT NULL
    GROUP BY code_system, code, value_quantity_unit
    HAVING count(DISTINCT (_source, patient_key)) FILTER (WHERE patient_key IS NOT NULL) >= %(smallest)s
    ORDER BY 3 DESC, 1
    LIMIT 20
    """,
)
COMPLETENESS = (
    _measure_completeness("patient", "gender", "birth_date", "race_code"),
    _measure_completeness("condition", "code", "onset_start", "patient_key"),
    _measure_completeness("encounter", "class_code", "period_start", "patient_key"),
    _measure_completeness("observation", "loinc_code", "effective_start", "patient_key"),
)
FRESHNESS = tuple(_measure_freshness(kind.key, kind.name) for kind in sorted(CATALOG, key=lambda kind: kind.name))
PANELS = (POPULATION, CONDITIONS, ENCOUNTERS, LABS, *COMPLETENESS, *FRESHNESS)


def read(conn: Connection, panel: Panel) -> Answer | None:
    """Return the answer of a panel, None if one of its tables does not exist: nothing of its type was loaded.

    It is None too if a view of FHIR_VIEWS replaces a shipped one without the columns that the panel reads. Raises
    ConfigurationError if the login may not read the tables.
    """
    try:
        with conn.transaction():
            return _query(conn, panel)
    except psycopg.errors.UndefinedColumn:
        return None
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigurationError(
            f"The login of DB_URL may not read {', '.join(panel.relations)}: grant it the role fhir_reader"
        ) from None


def _query(conn: Connection, panel: Panel) -> Answer | None:
    row = conn.execute(
        """
        SELECT bool_and(to_regclass(name) IS NOT NULL)
        FROM unnest(%s::text[]) AS name
        """,
        [list(panel.relations)],
    ).fetchone()
    if not (row and row[0]):
        return None
    cursor = conn.execute(panel.statement, {"smallest": SMALLEST_GROUP})
    return Answer(tuple(column.name for column in cursor.description or ()), cursor.fetchall())
