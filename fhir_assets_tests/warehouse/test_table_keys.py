"""Keys, indexes, comments and added columns of the tables of views."""

from datetime import UTC, date, datetime
from typing import Any

import psycopg
import pytest

from fhir_assets.errors import ViewError
from fhir_assets.fhir.record import Deletion
from fhir_assets.fhir.views import View, load_views, parse_view
from fhir_assets.fhir.views.row_identity import find_identity, find_key_column
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.db.schema_state import sql_folder
from fhir_assets.warehouse.postgres.tables import deletions, view_tables
from fhir_assets.warehouse.postgres.tables.layout import build_layout
from fhir_assets_tests.support.views import column, load, patient, select, view

ID = column("id", "getResourceKey()", "string")
PARENT = column("patient_key", "getResourceKey()", "string")
INDEX = column("index", "%rowIndex", "integer")
MAIN = view("patient", "Patient", ID, column("gender", "gender", "code"))


def nested(*selects: dict[str, Any]) -> View:
    return parse_view(
        {
            "resourceType": "ViewDefinition",
            "name": "v",
            "status": "active",
            "resource": "Patient",
            "select": list(selects),
        }
    )


NAMES = nested({"column": [PARENT]}, {"forEach": "name", "column": [INDEX, column("family", "family", "string")]})
CONTACTS = nested(
    {"column": [PARENT]},
    {
        "forEach": "contact",
        "column": [column("contact_index", "%rowIndex", "integer")],
        "select": [{"forEach": "telecom", "column": [INDEX, column("value", "value", "string")]}],
    },
)


@pytest.mark.parametrize(
    ("defined", "identity"),
    [
        (MAIN, ("id",)),
        (NAMES, ("patient_key", "index")),
        (CONTACTS, ("patient_key", "contact_index", "index")),
        (
            nested({"column": [ID]}, {"forEachOrNull": "name.first()", "column": [column("f", "family", "string")]}),
            ("id",),
        ),
        (nested({"column": [ID]}, {"forEach": "name", "column": [column("f", "family", "string")]}), ()),
        (
            nested(
                {"column": [ID, column("i", "%rowIndex", "integer")]},
                {"unionAll": [{"column": [column("g", "gender", "code")]}]},
            ),
            (),
        ),
        (nested({"column": [ID]}, {"repeat": ["contact"], "column": [INDEX]}), ("id", "index")),
        (view("patient", "Patient", column("gender", "gender", "code")), ()),
    ],
)
def test_the_columns_that_identify_a_row_are_those_that_the_definition_shows(
    defined: View, identity: tuple[str, ...]
) -> None:
    assert find_identity(defined) == identity


def test_a_key_that_may_be_encrypted_is_not_the_key_of_the_table() -> None:
    tagged = view("patient", "Patient", {**ID, "tag": [{"name": "phi", "value": "hash"}]})
    assert find_key_column(tagged) is None
    assert build_layout(tagged, encrypted=True).key == "_resource_key"


def find_primary_key(conn: Session, table: str) -> list[str]:
    rows = select(
        conn,
        "SELECT a.attname::text FROM pg_index i"
        " JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey)"
        f" WHERE i.indrelid = 'fhir.{table}'::regclass AND i.indisprimary",
    )
    return sorted(name for (name,) in rows)


def test_every_shipped_table_has_its_primary_key_and_no_second_index_on_it(conn: Session) -> None:
    views = [each for each in load_views([sql_folder() / "views"]).views if each.name.startswith(("patient", "claim"))]
    view_tables.ensure_tables(conn, views)
    for each in views:
        assert find_primary_key(conn, each.name) == sorted(("_source", *build_layout(each).identity)), each.name
        assert "_resource_key" not in {
            name
            for (name,) in select(
                conn, f"SELECT attname::text FROM pg_attribute WHERE attrelid = 'fhir.{each.name}'::regclass"
            )
        }
    indexes = [
        definition for (definition,) in select(conn, "SELECT indexdef FROM pg_indexes WHERE tablename = 'patient'")
    ]
    assert [definition for definition in indexes if "(id" in definition] == [
        "CREATE UNIQUE INDEX patient_pkey ON fhir.patient USING btree (id, _source)"
    ]


def test_no_two_rows_of_a_resource_can_have_the_same_key(conn: Session) -> None:
    load(conn, patient("a", gender="male"), views=(MAIN,))
    conn.commit()
    with pytest.raises(psycopg.errors.UniqueViolation), conn.transaction():
        conn.execute("INSERT INTO fhir.patient (id) VALUES ('a')")
    load(conn, patient("a", "2024-01-02T00:00:00Z", "2", gender="female"), views=(MAIN,))
    assert select(conn, "SELECT id, gender FROM fhir.patient") == [("a", "female")]


def test_rows_of_a_resource_that_fhir_resource_lost_are_replaced(conn: Session) -> None:
    load(conn, patient("a", gender="male"), patient("b"), views=(MAIN,))
    conn.execute("DELETE FROM fhir.resource WHERE id = 'a'")
    counts, unloadable = load(conn, patient("a", gender="female"), patient("c"), views=(MAIN,))
    assert (counts.inserted, unloadable) == (2, [])
    assert select(conn, "SELECT id, gender FROM fhir.patient ORDER BY id") == [
        ("a", "female"),
        ("b", None),
        ("c", None),
    ]


def test_a_table_of_a_former_version_gets_its_key_and_loses_the_columns_that_it_replaces(conn: Session) -> None:
    load(conn, patient("a", gender="male"), views=(MAIN,))
    conn.execute("ALTER TABLE fhir.patient DROP CONSTRAINT patient_pkey, DROP COLUMN loaded_at")
    conn.execute("ALTER TABLE fhir.patient ADD COLUMN _resource_key text NOT NULL DEFAULT 'a'")
    conn.execute("CREATE INDEX ON fhir.patient (_resource_key); CREATE INDEX ON fhir.patient (id)")
    conn.execute("UPDATE ops.view_tables SET layout = 'former', key_column = '_resource_key'")
    view_tables.ensure_tables(conn, [MAIN])
    assert find_primary_key(conn, "patient") == ["_source", "id"]
    assert view_tables.find_drift(conn, MAIN) == []
    assert select(conn, "SELECT count(*) FROM pg_indexes WHERE tablename = 'patient'") == [(1,)]
    assert select(conn, "SELECT id, gender, loaded_at IS NOT NULL FROM fhir.patient") == [("a", "male", True)]
    assert select(conn, "SELECT key_column FROM ops.view_tables") == [("id",)]


def test_a_key_that_a_view_gets_later_takes_the_ids_of_the_rows(conn: Session) -> None:
    load(conn, patient("a"), views=(view("patient", "Patient", column("gender", "gender", "code")),))
    view_tables.ensure_tables(conn, [MAIN])
    assert select(conn, "SELECT id FROM fhir.patient") == [("a",)]
    assert find_primary_key(conn, "patient") == ["_source", "id"]


def test_rows_without_the_position_of_a_new_loop_prevent_the_key_only_until_they_are_written_again(
    conn: Session,
) -> None:
    unnumbered = nested({"column": [PARENT]}, {"forEach": "name", "column": [column("family", "family", "string")]})
    two = [{"family": "A"}, {"family": "B"}]
    load(conn, patient("a", name=two), views=(unnumbered,))
    view_tables.ensure_tables(conn, [NAMES])
    assert find_primary_key(conn, "v") == []
    assert [difference.kind for difference in view_tables.find_drift(conn, NAMES)] == ["index"]
    load(conn, patient("a", "2024-01-02T00:00:00Z", "2", name=two), views=(NAMES,))
    view_tables.ensure_tables(conn, [NAMES])
    assert find_primary_key(conn, "v") == ["_source", "index", "patient_key"]


def test_a_view_of_somebody_else_is_named_and_dropped_on_request_only(conn: Session) -> None:
    view_tables.ensure_tables(conn, [MAIN])
    conn.execute("CREATE VIEW public.genders AS SELECT gender FROM fhir.patient")
    changed = view("patient", "Patient", ID)
    with pytest.raises(ViewError, match=r"view genders depends on column gender .*--cascade"):
        view_tables.apply_changes(conn, [changed])
    assert select(conn, "SELECT count(*) FROM genders") == [(0,)]
    view_tables.apply_changes(conn, [changed], cascade=True)
    assert select(conn, "SELECT to_regclass('public.genders')") == [(None,)]


def test_comments_name_the_table_that_a_key_leads_to_and_the_columns_with_patient_data() -> None:
    encrypted = [{"name": "phi", "value": "encrypt"}]
    name = view(
        "patient_name",
        "Patient",
        PARENT,
        column("family", "family", "string", description="Family name", tag=encrypted),
        column("doctor_key", "%resource.generalPractitioner.getReferenceKey(Practitioner).first()", "string"),
        forEach="name",
    )
    described = {c.name: c.description for c in build_layout(name).columns}
    assert described["family"] == "Family name (patient data)"
    assert described["doctor_key"] == "doctor_key (-> fhir.practitioner.id)"
    described = {c.name: c.description for c in build_layout(name, encrypted=True).columns}
    assert described["family"] == "Family name (encrypted: a token that belongs to this row)"


# Days and offsets as written ---------------------------------------------------------------------------------------

DIED = view(
    "died",
    "Patient",
    ID,
    column("died", "deceased.ofType(dateTime)", "dateTime"),
    column("issued", "meta.lastUpdated", "instant"),
)


@pytest.mark.parametrize(
    ("written", "day", "offset", "precision"),
    [
        ("2020-05-01T22:30:00-04:00", date(2020, 5, 1), "-04:00", "instant"),
        ("2020-05-01T00:30:00+10:00", date(2020, 5, 1), "+10:00", "instant"),
        ("2020-05-01T00:30:00.123Z", date(2020, 5, 1), "+00:00", "instant"),
        ("2020-05-01", date(2020, 5, 1), None, "day"),
        ("2020-05", date(2020, 5, 1), None, "month"),
        ("2020", date(2020, 1, 1), None, "year"),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
def test_the_day_of_a_time_is_that_of_the_source_in_every_session(
    conn: Session, written: str, day: date, offset: str | None, precision: str, zone: str
) -> None:
    load(conn, patient("a", deceasedDateTime=written), patient("b"), views=(DIED,))
    conn.execute(f"SET TIME ZONE '{zone}'".encode())
    rows = select(conn, "SELECT id, died_date, died_offset, died_precision FROM fhir.died ORDER BY id")
    assert rows == [("a", day, offset, precision), ("b", None, None, None)]
    assert select(conn, "SELECT DISTINCT issued_date, issued_offset FROM fhir.died") == [(date(2024, 1, 1), "+00:00")]
    if offset:
        local = "SELECT (died AT TIME ZONE died_offset::interval)::date FROM fhir.died WHERE id = 'a'"
        assert select(conn, local) == [(day,)]


def test_columns_of_the_view_take_precedence_over_added_ones(conn: Session) -> None:
    own = view(
        "died",
        "Patient",
        ID,
        column("died", "deceased.ofType(dateTime)", "dateTime"),
        column("died_date", "gender", "code"),
        column("loaded_at", "language", "code"),
    )
    load(conn, patient("a", deceasedDateTime="2020-05-01", gender="male", language="de"), views=(own,))
    assert select(conn, "SELECT died_date, loaded_at FROM fhir.died") == [("male", "de")]


def test_a_row_has_the_time_of_its_load(conn: Session) -> None:
    load(conn, patient("a", gender="male"), views=(MAIN,))
    conn.commit()
    load(conn, patient("b"), views=(MAIN,))
    times = dict(select(conn, "SELECT id, loaded_at FROM fhir.patient"))
    assert isinstance(times["a"], datetime)
    assert times["a"] < times["b"]


def test_a_reader_finds_what_was_deleted_and_when(conn: Session) -> None:
    load(conn, patient("a", gender="male"), patient("b"), views=(MAIN,))
    deletion = Deletion("Patient", "a", datetime(2024, 2, 1, tzinfo=UTC))
    deletions.apply(conn, [deletion], run_id="run", partition_key="2024-02-01")
    assert select(conn, "SELECT type, id, deleted_at, why, source FROM fhir.deleted") == [
        ("Patient", "a", datetime(2024, 2, 1, tzinfo=UTC), "deleted at the source", "default")
    ]
