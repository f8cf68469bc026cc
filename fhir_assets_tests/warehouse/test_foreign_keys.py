"""Foreign keys as a setting: tools see where a key leads, and rows without a target are loaded nevertheless."""

from types import SimpleNamespace
from typing import cast

import pytest

from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.views import parse_view
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, connect
from fhir_assets.warehouse.postgres.db.schema_state import lock_schema
from fhir_assets.warehouse.postgres.tables import foreign_keys, view_tables
from fhir_assets_tests.support.shipped_views import views, views_of_type
from fhir_assets_tests.support.views import load, patient, select

LIST = """
    SELECT k.conrelid::regclass::text, pg_get_constraintdef(k.oid)
    FROM pg_constraint k
    WHERE k.contype = 'f' AND k.connamespace = 'fhir'::regnamespace
    ORDER BY 1, 2
"""


def list_keys(conn: Session) -> dict[str, str]:
    """Return the column and target of each foreign key: ``{"patient_name.patient_key": "patient"}``."""
    keys = {}
    for table, definition in select(conn, LIST):
        assert definition.endswith("NOT ENFORCED")
        column = definition.partition("(")[2].partition(",")[0]
        keys[f"{table.removeprefix('fhir.')}.{column}"] = definition.partition("REFERENCES fhir.")[2].partition("(")[0]
    return keys


@pytest.fixture
def enforcing(conn: Session) -> None:
    if conn.info.server_version < 180_000:
        pytest.skip("needs keys that are not enforced: Postgres 18")


@pytest.mark.usefixtures("enforcing")
def test_all_keys_of_the_shipped_views_are_foreign_keys(conn: Session) -> None:
    shipped = list(views().values())
    view_tables.ensure_tables(conn, shipped)
    conn.commit()
    count = foreign_keys.apply(conn, shipped, wanted=True)
    keys = list_keys(conn)
    assert len(keys) == count > 300
    assert keys["condition.patient_key"] == "patient"
    assert keys["patient_name.patient_key"] == "patient"
    assert keys["observation.encounter_key"] == "encounter"
    assert foreign_keys.apply(conn, shipped, wanted=True) == count
    assert list_keys(conn) == keys
    assert foreign_keys.apply(conn, shipped, wanted=False) == 0
    assert list_keys(conn) == {}


@pytest.mark.usefixtures("enforcing")
def test_a_row_whose_target_is_missing_is_loaded_and_a_column_can_be_dropped(conn: Session) -> None:
    people = tuple(views_of_type("Patient"))
    view_tables.ensure_tables(conn, [*people, *views_of_type("Organization")])
    conn.execute("ALTER TABLE fhir.patient ADD CONSTRAINT mine FOREIGN KEY (id, _source) REFERENCES fhir.patient")
    conn.commit()
    foreign_keys.apply(conn, list(views().values()), wanted=True)
    _, unloadable = load(conn, patient("a", managingOrganization={"reference": "Organization/none"}), views=people)
    assert unloadable == []
    assert select(conn, "SELECT managing_organization_key FROM fhir.patient") == [("none",)]
    definition = views()["patient"].definition
    kept = [
        {**part, "column": [c for c in part.get("column", []) if c["name"] != "managing_organization_key"]}
        for part in definition["select"]
    ]
    view_tables.apply_changes(conn, [parse_view({**definition, "select": kept})])
    conn.commit()
    left = {definition for _, definition in select(conn, LIST)}
    assert not [definition for definition in left if "managing_organization_key" in definition]
    assert len(left) > 1
    conn.execute("DELETE FROM fhir.patient")
    foreign_keys.apply(conn, people, wanted=False)
    assert [definition for _, definition in select(conn, LIST) if "NOT ENFORCED" in definition] == []
    assert len(select(conn, LIST)) == 1


def test_a_server_without_such_keys_is_an_error_that_says_what_to_do() -> None:
    old = cast(Session, SimpleNamespace(info=SimpleNamespace(server_version=170_004)))
    with pytest.raises(ConfigurationError, match=r"needs Postgres 18, and this is 17.*Unset it"):
        foreign_keys.apply(old, [], wanted=True)


@pytest.mark.usefixtures("enforcing")
def test_keys_that_another_migrate_creates_while_this_one_waits_are_not_created_again(
    conn: Session, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = views_of_type("Patient")
    view_tables.ensure_tables(conn, people)
    conn.commit()
    replaced = "fhir_assets.warehouse.postgres.tables.foreign_keys.lock_schema"

    def lock_after_another(waiting: Connection) -> None:
        monkeypatch.setattr(replaced, lock_schema)
        with connect(database, cipher=NO_ENCRYPTION) as other:
            assert foreign_keys.apply(other, people, wanted=True) > 0
        lock_schema(waiting)

    monkeypatch.setattr(replaced, lock_after_another)
    assert foreign_keys.apply(conn, people, wanted=True) == len(list_keys(conn))
