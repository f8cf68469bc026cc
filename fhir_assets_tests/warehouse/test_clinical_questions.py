"""Clinical questions have the same answer from the tables, the lake and exports, and it is that of the resources.

The answers are computed from the lines of NDJSON by code that shares nothing with the project. DuckDB reads the lake
and the exported files.
"""

import gzip
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import orjson
import pytest

from fhir_assets.deployment.store import build_blobs
from fhir_assets.fhir.intake.formulas import remove_guard
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.views import View
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.settings import load_settings
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.exports.export import Export
from fhir_assets.warehouse.exports.parquet import EXACT_COLUMN
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables
from fhir_assets_tests.support.clinical import findings, people, treatments
from fhir_assets_tests.support.clinical.made_data import build_resources
from fhir_assets_tests.support.clinical.questions import QUESTIONS, Hospital, Question
from fhir_assets_tests.support.databases import fresh_database
from fhir_assets_tests.support.deployment import SHARED
from fhir_assets_tests.support.shipped_views import views
from fhir_assets_tests.support.views import load

SYNTHEA = SHARED / "synthea"
KEY = "2024-01-01"
Ask = Callable[[str], list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Warehouse:
    """The resources, and the places that answer SQL, by name."""

    hospital: Hospital
    places: dict[str, Ask]


def read_made_data() -> list[bytes]:
    return [orjson.dumps(resource) for resource in build_resources()]


def read_synthea() -> list[bytes]:
    files = sorted(SYNTHEA.glob("*.ndjson.gz"))
    return [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(read_made_data, id="made data"),
        pytest.param(
            read_synthea,
            id="Synthea",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not SYNTHEA.exists(), reason="the shared data is not beside this checkout"),
            ],
        ),
    ],
)
def warehouse(
    request: pytest.FixtureRequest, postgres: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Warehouse]:
    """The tables that the questions read, loaded once for all questions, their lake and their exports."""
    folder = tmp_path_factory.mktemp("clinical")
    lines = request.param()
    wanted = {name for question in QUESTIONS.values() for name in question.list_tables()}
    with ExitStack() as stack:
        url = stack.enter_context(fresh_database(postgres))
        conn = stack.enter_context(connect(url, cipher=NO_ENCRYPTION))
        tables = [view for name, view in sorted(views().items()) if name in wanted]
        load_lines(conn, lines, tables)
        conn.commit()
        write_files(conn, folder, tables)
        places: dict[str, Ask] = {"postgres": lambda statement: conn.execute(statement.encode()).fetchall()}
        for place in ("lake", "parquet", "csv"):
            files = stack.enter_context(duckdb.connect())
            create_tables(files, folder, place, tables)
            places[place] = partial(ask_files, files, guarded=place == "csv")
        yield Warehouse(Hospital(lines), places)


def load_lines(conn: Session, lines: list[bytes], tables: list[View]) -> None:
    """Load all resources of the types of the tables."""
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    records: dict[str, list[Record]] = defaultdict(list)
    for line in lines:
        resource = orjson.loads(line)
        record = Record(resource["resourceType"], resource["id"], resource["meta"]["versionId"], moment, moment, line)
        records[record.resource_type].append(record)
    ensure_tables(conn, tables)
    for resource_type in sorted({view.resource_type for view in tables} & records.keys()):
        of_type = tuple(view for view in tables if view.resource_type == resource_type)
        _, unloadable = load(conn, *records[resource_type], views=of_type, key=KEY)
        assert unloadable == []


def write_files(conn: Session, folder: Path, tables: list[View]) -> None:
    """Write the tables to the lake, and export them as Parquet and CSV."""
    lake = build_blobs(load_settings(), str(folder / "lake"))
    store = open_store(str(folder / "store"), NO_ENCRYPTION)
    target = open_store(str(folder / "exports"), NO_ENCRYPTION).blobs
    for view in tables:
        writer.update(conn, lake, view, [KEY], run_id="run", actor="test")
    with Export(conn, store, target, "", actor="test", withholding=False) as export:
        for view in tables:
            for form in ("parquet", "csv"):
                export.for_type(view.resource_type, None).write_table(view, form)
        export.finish()


def create_tables(files: duckdb.DuckDBPyConnection, folder: Path, place: str, tables: list[View]) -> None:
    """Create views of schema fhir over the files of a place. Cells of CSV have the types of the Parquet files."""
    files.execute("SET TimeZone = 'UTC'; CREATE SCHEMA fhir")
    for view in tables:
        source = {
            "lake": f"read_parquet('{folder}/lake/{view.name}/*/*.parquet', hive_partitioning = true)",
            "parquet": f"read_parquet('{folder}/exports/{view.name}.parquet')",
        }.get(place)
        if source is None:
            described = files.execute(f"DESCRIBE SELECT * FROM '{folder}/exports/{view.name}.parquet'").fetchall()
            types = {name: kind for name, kind, *_ in described if name != EXACT_COLUMN}
            source = (
                f"read_csv('{folder}/exports/{view.name}.csv', header = true, auto_detect = false, columns = {types})"
            )
        files.execute(f"CREATE VIEW fhir.{view.name} AS SELECT * FROM {source}")


def ask_files(files: duckdb.DuckDBPyConnection, statement: str, *, guarded: bool) -> list[tuple[Any, ...]]:
    """Return the rows of a statement. ``guarded`` text has an apostrophe if a spreadsheet would run it as a formula."""
    rows: list[tuple[Any, ...]] = files.execute(statement).fetchall()
    if not guarded:
        return rows
    return [tuple(remove_guard(value) if isinstance(value, str) else value for value in row) for row in rows]


def plain(value: Any) -> Any:
    """Return a value in a form that does not depend on the client that has read it."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        number = Decimal(str(value))
        return f"{number.normalize():f}" if number else "0"
    return value


def sort_rows(rows: Any) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(map(plain, row)) for row in rows)


def test_there_are_at_least_thirty_questions() -> None:
    modules = {question.answer.__module__ for question in QUESTIONS.values()}
    assert modules == {module.__name__ for module in (people, findings, treatments)}
    assert len(QUESTIONS) >= 30


def test_the_made_data_is_valid_and_answers_every_question() -> None:
    lines = read_made_data()
    validator = Validator()
    assert [result.issues for line in lines if not (result := validator.check(line)).valid] == []
    hospital = Hospital(lines)
    assert [name for name, question in QUESTIONS.items() if not list(question.answer(hospital))] == []


@pytest.mark.parametrize("question", [pytest.param(item, id=name) for name, item in QUESTIONS.items()])
def test_the_answer_is_that_of_the_resources(warehouse: Warehouse, question: Question) -> None:
    expected = sort_rows(question.answer(warehouse.hospital))
    found = {place: sort_rows(ask(question.statement)) for place, ask in warehouse.places.items()}
    assert {place: (rows - expected, expected - rows) for place, rows in found.items() if rows != expected} == {}
