"""The tables of views: creation, changes of a view, and differences."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from fhir_assets.errors import ViewError
from fhir_assets.fhir.views import View, load_views
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, connect
from fhir_assets.warehouse.postgres.db.migrations import sql_folder
from fhir_assets.warehouse.postgres.tables import view_tables
from fhir_assets_tests.support.views import PATIENT, PATIENTS, column, load, patient, select, view


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
        "active": "boolean",
        "birth_order": "integer",
        "updated": "timestamp with time zone",
        "given": "text[]",
        "_source": "text",
    }


def test_indexes_and_comments_come_from_the_view(conn: Session) -> None:
    view_tables.ensure_tables(conn, PATIENTS)
    indexes = select(conn, "SELECT indexdef FROM pg_indexes WHERE schemaname = 'fhir' AND tablename = 'patient'")
    assert {definition.split("USING ")[1] for (definition,) in indexes} == {
        "btree (_resource_key)",
        "btree (gender)",
        "btree (born)",
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
    assert view_tables.apply_changes(conn, [changed])
    assert view_tables.find_drift(conn, changed) == []
    load(conn, patient("a", gender="male"), views=(changed,))
    assert set(read_columns(conn, "patient")) == {"_resource_key", "_source", changed.columns[0].name}


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
    ],
)
def test_names_that_cannot_be_tables_are_refused(conn: Session, wrong: View, words: str) -> None:
    with pytest.raises(ViewError, match=words):
        view_tables.ensure_tables(conn, [wrong])
