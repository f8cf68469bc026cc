"""The tables of views: creation, changes of a view, and differences."""

import csv
import json
import keyword
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from fhir_assets.errors import ViewError
from fhir_assets.fhir.views import View, load_views
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.exports.export import Export, Format
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, connect
from fhir_assets.warehouse.postgres.db.schema_state import sql_folder
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets_tests.support.views import PATIENT, PATIENTS, column, load, patient, select, view

SYSTEM_COLUMNS = ("tableoid", "xmin", "cmin", "xmax", "cmax", "ctid")
EXPORT_FORMATS: tuple[Format, ...] = ("csv", "ndjson", "parquet")


def read_columns(conn: Connection, table: str) -> dict[str, str]:
    return dict(
        select(
            conn,
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
            f" WHERE attrelid = 'fhir.{table}'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        )
    )


def test_columns_are_typed_and_partial_dates_have_their_precision(conn: Session) -> None:
    view_tables.ensure_tables(conn, PATIENTS)
    assert read_columns(conn, "patient") == {
        "_resource_key": "text",
        "gender": "text",
        "born": "date",
        "born_precision": "text",
        "died": "timestamp with time zone",
        "died_precision": "text",
        "died_date": "date",
        "died_offset": "text",
        "active": "boolean",
        "birth_order": "integer",
        "updated": "timestamp with time zone",
        "updated_date": "date",
        "updated_offset": "text",
        "given": "text[]",
        "loaded_at": "timestamp with time zone",
        "_source": "text",
    }


def test_indexes_and_comments_come_from_the_view(conn: Session) -> None:
    view_tables.ensure_tables(conn, PATIENTS)
    indexes = select(conn, "SELECT indexdef FROM pg_indexes WHERE schemaname = 'fhir' AND tablename = 'patient'")
    assert {definition.split("USING ")[1] for (definition,) in indexes} == {
        "btree (_resource_key)",
        "btree (gender) WHERE (gender IS NOT NULL)",
        "btree (born) WHERE (born IS NOT NULL)",
    }
    comments = "SELECT obj_description('fhir.patient'::regclass), col_description('fhir.patient'::regclass, 2)"
    assert select(conn, comments) == [("The table patient", "Administrative gender")]


def test_every_shipped_view_has_a_table_that_fits_it(conn: Session) -> None:
    views = load_views([sql_folder() / "views"]).views
    assert views
    view_tables.ensure_tables(conn, views)
    assert [difference for shipped in views for difference in view_tables.find_drift(conn, shipped)] == []


def test_ensuring_current_tables_takes_no_lock(conn: Session) -> None:
    view_tables.ensure_tables(conn, PATIENTS)
    conn.commit()
    view_tables.ensure_tables(conn, PATIENTS)
    # Other tests work in other databases of the same server.
    in_this_database = "database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    assert select(conn, f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND {in_this_database}") == [(0,)]


def test_concurrent_sessions_may_ensure_the_same_tables(database: str) -> None:
    def work(_: int) -> None:
        with connect(database, cipher=NO_ENCRYPTION) as conn:
            view_tables.ensure_tables(conn, PATIENTS)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        assert view_tables.find_drift(conn, PATIENT) == []


def build_view(*columns: dict[str, object]) -> View:
    return view("patient", "Patient", *columns)


def test_a_new_column_is_added_and_the_windows_are_marked_as_not_loaded(conn: Session) -> None:
    small = build_view(column("gender", "gender", "code"))
    load(conn, patient("a", gender="male"), views=(small,))
    record_loaded_part(conn)
    wider = build_view(column("gender", "gender", "code"), column("born", "birthDate", "date", index=True))
    view_tables.ensure_tables(conn, [wider])
    assert view_tables.find_drift(conn, wider) == []
    assert select(conn, "SELECT _resource_key, gender, born FROM fhir.patient") == [("a", "male", None)]
    assert checkpoints.get_loaded_parts(conn, "Patient", ["w"]) == {}


def test_a_changed_path_marks_the_windows_as_not_loaded(conn: Session) -> None:
    view_tables.ensure_tables(conn, [build_view(column("who", "gender", "code"))])
    record_loaded_part(conn)
    view_tables.ensure_tables(conn, [build_view(column("who", "language", "code"))])
    assert checkpoints.get_loaded_parts(conn, "Patient", ["w"]) == {}


def test_a_new_comment_or_index_leaves_the_windows_loaded(conn: Session) -> None:
    view_tables.ensure_tables(conn, [build_view(column("who", "gender", "code"))])
    record_loaded_part(conn)
    commented = build_view(column("who", "gender", "code", description="Administrative gender", index=True))
    view_tables.ensure_tables(conn, [commented])
    assert view_tables.find_drift(conn, commented) == []
    assert checkpoints.get_loaded_parts(conn, "Patient", ["w"]) == {"w": frozenset({"p"})}


def record_loaded_part(conn: Connection) -> None:
    conn.execute(
        "INSERT INTO ops.loaded_parts (resource_type, partition_key, part, rows, run_id)"
        " VALUES ('Patient', 'w', 'p', 1, 'r')"
    )
    assert checkpoints.get_loaded_parts(conn, "Patient", ["w"]) == {"w": frozenset({"p"})}


@pytest.mark.parametrize(
    "changed",
    [build_view(column("gender", "gender = 'male'", "boolean")), build_view(column("sex", "gender", "code"))],
    ids=["another type", "a column less"],
)
def test_a_change_that_loses_data_is_refused_until_it_is_requested(conn: Session, changed: View) -> None:
    original = build_view(column("gender", "gender", "code"))
    load(conn, patient("a", gender="male"), views=(original,))
    with pytest.raises(ViewError, match=r"gender.*--apply-view-changes"):
        view_tables.ensure_tables(conn, [changed])
    assert select(conn, "SELECT gender FROM fhir.patient") == [("male",)]
    assert view_tables.find_drift(conn, changed)
    assert view_tables.apply_changes(conn, [changed]).differences
    assert view_tables.find_drift(conn, changed) == []
    load(conn, patient("a", gender="male"), views=(changed,))
    assert set(read_columns(conn, "patient")) == {"_resource_key", "_source", "loaded_at", changed.columns[0].name}


def test_manual_changes_of_a_table_are_reported(conn: Session) -> None:
    view_tables.ensure_tables(conn, PATIENTS)
    conn.execute("ALTER TABLE fhir.patient DROP COLUMN active")
    conn.execute("ALTER TABLE fhir.patient ALTER COLUMN birth_order TYPE bigint")
    conn.execute("ALTER TABLE fhir.patient ADD COLUMN extra text")
    conn.execute("DROP INDEX fhir.patient_gender_idx")
    assert {str(difference) for difference in view_tables.find_drift(conn, PATIENT)} == {
        "column active is in the view but not in the table",
        "column birth_order is bigint in the table but integer in the view",
        "column extra is in the table but not in the view",
        "index gender is missing",
    }
    conn.execute("DROP TABLE fhir.patient")
    assert [str(difference) for difference in view_tables.find_drift(conn, PATIENT)] == ["table patient is missing"]
    view_tables.ensure_tables(conn, PATIENTS)
    assert view_tables.find_drift(conn, PATIENT) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (view("resource", "Patient", column("a", "id", "id")), "belongs to"),
        (view("resource_patient", "Patient", column("a", "id", "id")), "belongs to"),
        (view("x" * 64, "Patient", column("a", "id", "id")), "63 bytes"),
        (view("v", "Patient", column("a" * 60, "birthDate", "date")), "63 bytes"),
        (
            view("v", "Patient", column("b", "birthDate", "date"), column("b_precision", "gender", "code")),
            "two columns",
        ),
        *((view("v", "Patient", column(name, "id", "id")), "system column") for name in SYSTEM_COLUMNS),
        (view("v", "Patient", *(column(f"c{n}", "gender", "code") for n in range(1598))), "1601 columns"),
        (view("v", "Patient", *(column(f"d{n}", "birthDate", "date") for n in range(800))), "1603 columns"),
        (view("v", "Patient", column("a", "active", "boolean", tag=[{"name": "index", "value": "brin"}])), "brin"),
        (view("v", "Patient", column("a", "id", "id", tag=[{"name": "phi", "value": "hide"}])), "tag phi is hide"),
    ],
)
def test_a_view_that_can_have_no_table_is_refused_by_its_name(conn: Session, wrong: View, words: str) -> None:
    with pytest.raises(ViewError, match=f"view {wrong.name}\\b.*({words})"):
        view_tables.ensure_tables(conn, [wrong])


def test_the_name_of_another_relation_is_refused_by_the_name_of_the_view(conn: Session) -> None:
    view_tables.ensure_tables(conn, PATIENTS)
    with pytest.raises(ViewError, match=r"view patient_gender_idx: .* already exists"):
        view_tables.ensure_tables(conn, [view("patient_gender_idx", "Patient", column("a", "id", "id"))])


def test_a_table_of_the_maximum_number_of_columns_is_created(conn: Session) -> None:
    widest = view("widest", "Patient", *(column(f"c{n}", "gender", "code") for n in range(1597)))
    counts, unloadable = load(conn, patient("a"), views=(widest,))
    assert (counts.inserted, unloadable) == (1, [])
    assert len(read_columns(conn, "widest")) == 1600


def test_any_other_word_can_be_the_name_of_a_column_or_of_a_view(conn: Session, tmp_path: Path) -> None:
    """All key words of SQL, the columns of our own tables, key words of Python, upper case, and the longest name."""
    words = {word for (word,) in select(conn, "SELECT word FROM pg_get_keywords()")}
    ours = select(conn, "SELECT attname FROM pg_attribute WHERE attrelid = 'fhir.resource'::regclass AND attnum > 0")
    names = sorted(words | {name for (name,) in ours} | {*keyword.kwlist, "v", "r", "s", "stored", "excluded"})
    names = [name for name in names if not name.startswith("_")] + ["ID", "Id", "x" * 63]
    wide = view("select", "Patient", *(column(name, "id", "id") for name in names))
    others = tuple(
        view(name, "Patient", column("id", "id", "id")) for name in ("table", "class", "None", "User", "user")
    )
    counts, unloadable = load(conn, patient("a"), patient("b"), views=(wide, *others))
    assert (counts.inserted, unloadable) == (2, [])
    assert [view_tables.find_drift(conn, each) for each in (wide, *others)] == [[]] * 6
    for form in EXPORT_FORMATS:
        rows = export_rows(conn, tmp_path / form, wide, form)
        assert sorted(row["select"] for row in rows) == ["a", "b"]
        assert {key for row in rows for key in row} == {*names, "_resource_key"}


def export_rows(conn: Session, folder: Path, wide: View, form: Format) -> list[dict[str, Any]]:
    """Export the table of a view and return its rows."""
    store = open_store(str(folder), NO_ENCRYPTION)
    with Export(conn, store, store.blobs, "", actor="test", withholding=False) as export:
        export.for_type("Patient", None).write_table(wide, form)
        export.finish()
    path = folder / f"{wide.name}.{form}"
    if form == "parquet":
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    with path.open(newline="") as text:
        return list(csv.DictReader(text)) if form == "csv" else [json.loads(line) for line in text]
