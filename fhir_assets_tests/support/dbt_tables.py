"""The models of the dbt package as views over staging tables, on Postgres and DuckDB, for tests that insert rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import psycopg
import pytest

from fhir_assets.warehouse.dbt.package import build_package
from fhir_assets_tests.support.databases import fresh_database
from fhir_assets_tests.support.dbt_models import build_staging_tables, render_models
from fhir_assets_tests.support.shipped_views import views

Execute = Callable[[str], list[tuple[Any, ...]]]


@contextmanager
def connect_to(engine: str, postgres: str) -> Iterator[Execute]:
    if engine == "duckdb":
        with duckdb.connect() as lake:
            yield lambda statement: lake.execute(statement).fetchall()
        return
    with fresh_database(postgres, "template0") as url, psycopg.connect(url, autocommit=True) as tables:

        def run(statement: str) -> list[tuple[Any, ...]]:
            cursor = tables.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

        yield run


def create_models(execute: Execute, engine: str, *, encrypted: bool) -> None:
    """Create empty tables for the staging models, and the other models as views of them."""
    files = build_package(list(views().values()), lake_url=None, encrypted=encrypted)
    execute(build_staging_tables(files, views(), engine, encrypted=encrypted))
    for name, select in render_models(files, engine):
        execute(f"CREATE VIEW {name} AS {select}")


@pytest.fixture(scope="module", params=["postgres", "duckdb"])
def models(request: pytest.FixtureRequest, postgres: str) -> Iterator[Execute]:
    """The models over empty tables without encryption, for all tests of an engine."""
    with connect_to(request.param, postgres) as execute:
        create_models(execute, request.param, encrypted=False)
        yield execute


@pytest.fixture
def execute(models: Execute) -> Iterator[Execute]:
    """The models over tables whose rows are gone after the test."""
    models("BEGIN")
    yield models
    models("ROLLBACK")


def insert(execute: Execute, table: str, **values: object) -> None:
    row = {"_source": "default", "loaded_at": "2024-01-01 00:00:00+00", **values}
    columns = ", ".join(f'"{column}"' for column in row)
    literals = ", ".join(f"'{value}'" for value in row.values())
    execute(f"INSERT INTO {table} ({columns}) VALUES ({literals})")


def insert_claim(
    execute: Execute, key: str, item: dict[str, str], amounts: tuple[tuple[str, str], ...] = (), **columns: str
) -> None:
    """Insert an ExplanationOfBenefit with one item and its adjudications: their codes and amounts."""
    insert(execute, "stg_explanation_of_benefit", id=key, patient_key="a", **columns)
    insert(execute, "stg_explanation_of_benefit_item", explanation_of_benefit_key=key, index="0", **item)
    for index, (code, amount) in enumerate(amounts):
        insert(
            execute,
            "stg_explanation_of_benefit_item_adjudication",
            explanation_of_benefit_key=key,
            item_index="0",
            index=index,
            category_code=code,
            amount_value=amount,
            amount_currency="USD",
        )
