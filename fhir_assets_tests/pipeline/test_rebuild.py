"""Changed views are filled from the stored resources, in batches, without a load."""

from collections.abc import Iterator

import pytest

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.rebuild.step import RebuildProgress, RebuildResult, RebuildStep
from fhir_assets.privacy.keys import new_key
from fhir_assets.privacy.places import value_place
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.tables import rebuilding, view_tables
from fhir_assets_tests.support.key_rotation import open_session
from fhir_assets_tests.support.views import column, load, patient, select, view

ID = column("id", "getResourceKey()", "string")
FAMILY = column("family", "name.first().family", "string", tag=[{"name": "phi", "value": "encrypt"}])
SMALL = view("patient", "Patient", ID, column("gender", "gender", "code"))
WIDE = view("patient", "Patient", ID, column("gender", "gender", "code"), FAMILY, column("born", "birthDate", "date"))
FAMILIES = {"p0": "F0", "p1": "F1", "p2": "F2", "p3": "F3", "p4": "F4"}


@pytest.fixture(params=["without keys", "with keys"])
def session(request: pytest.FixtureRequest, database: str) -> Iterator[Session]:
    with open_session(database, *([new_key()] if request.param == "with keys" else [])) as session:
        people = [patient(key, gender="male", name=[{"family": family}]) for key, family in FAMILIES.items()]
        load(session, *people, views=(SMALL,))
        for part in ("a", "b"):
            session.execute(
                "INSERT INTO ops.loaded_parts (resource_type, partition_key, part, rows, run_id)"
                " VALUES ('Patient', 'w', %s, 1, 'r')",
                [part],
            )
        session.commit()
        yield session


def rebuild(database: str, session: Session, *views: View, drop_columns: bool = False) -> RebuildResult:
    step = RebuildStep(lambda: connect(database, cipher=session.cipher), views)
    return step.run(drop_columns=drop_columns)


def read_families(session: Session) -> dict[str, str | None]:
    rows = select(session, "SELECT id, family FROM fhir.patient")
    assert len(rows) == len(dict(rows))
    decrypt = session.cipher.decrypt_token
    return {
        key: decrypt(value, value_place("patient", "family", "default", key)) if value else None for key, value in rows
    }


def test_a_new_column_is_filled_in_batches_and_the_windows_stay_loaded(
    database: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "BATCH_RESOURCES", 2)
    before = select(session, "SELECT id, resource::text, loaded_at FROM fhir.resource ORDER BY id")
    session.commit()
    progress: list[RebuildProgress] = []
    step = RebuildStep(lambda: connect(database, cipher=session.cipher), [WIDE], on_progress=progress.append)
    assert step.run() == RebuildResult({"Patient": 5})
    assert [(p.done, p.total) for p in progress] == [(2, 5), (4, 5), (5, 5)]
    assert read_families(session) == FAMILIES
    assert select(session, "SELECT id, resource::text, loaded_at FROM fhir.resource ORDER BY id") == before
    assert checkpoints.get_loaded_parts(session, "Patient", ["w"]) == {"w": frozenset({"a", "b"})}


def test_the_second_time_there_is_nothing_to_do(database: str, session: Session) -> None:
    rebuild(database, session, WIDE)
    assert rebuild(database, session, WIDE) == RebuildResult()


def test_a_column_that_replaces_another_is_filled(database: str, session: Session) -> None:
    rebuild(database, session, WIDE)
    rebuild(database, session, SMALL, drop_columns=True)
    assert rebuild(database, session, WIDE) == RebuildResult({"Patient": 5})
    assert read_families(session) == FAMILIES


def test_a_resource_that_gives_no_rows_keeps_its_rows_and_the_next_load_takes_the_windows_again(
    database: str, session: Session
) -> None:
    several = view(
        "patient", "Patient", ID, column("gender", "gender", "code"), column("family", "name.family", "string")
    )
    load(
        session,
        patient("p1", "2024-01-02T00:00:00Z", "2", gender="male", name=[{"family": "A"}, {"family": "B"}]),
        views=(SMALL,),
    )
    session.commit()
    assert rebuild(database, session, several) == RebuildResult({"Patient": 4}, {"Patient": 1})
    rows = dict(select(session, "SELECT id, gender || coalesce(family, '?') FROM fhir.patient"))
    assert rows == {"p0": "maleF0", "p1": "male?", "p2": "maleF2", "p3": "maleF3", "p4": "maleF4"}
    assert checkpoints.get_loaded_parts(session, "Patient", ["w"]) == {}


def test_a_rebuild_that_is_stopped_is_continued_by_the_next_one_or_by_loads(
    database: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "BATCH_RESOURCES", 2)

    def stop(progress: RebuildProgress) -> None:
        raise KeyboardInterrupt

    step = RebuildStep(lambda: connect(database, cipher=session.cipher), [WIDE], on_progress=stop)
    with pytest.raises(KeyboardInterrupt):
        step.run()
    assert len(read_families(session)) == 5
    assert checkpoints.get_loaded_parts(session, "Patient", ["w"]) == {}
    session.commit()
    assert rebuild(database, session, WIDE) == RebuildResult({"Patient": 5})
    assert read_families(session) == FAMILIES
    session.commit()
    assert rebuild(database, session, WIDE) == RebuildResult()


def test_a_table_that_a_load_has_changed_is_filled_by_the_next_rebuild(database: str, session: Session) -> None:
    view_tables.ensure_tables(session, [WIDE])
    session.commit()
    assert rebuild(database, session, WIDE) == RebuildResult({"Patient": 5})
    assert read_families(session) == FAMILIES


def test_a_version_that_is_loaded_meanwhile_stays(
    database: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "BATCH_RESOURCES", 2)

    def load_newer(progress: RebuildProgress) -> None:
        if progress.done == 2:
            newer = [patient(key, "2024-01-02T00:00:00Z", "2", name=[{"family": "New"}]) for key in ("p0", "p4")]
            load(session, *newer, views=(WIDE,))
            session.commit()

    step = RebuildStep(lambda: connect(database, cipher=session.cipher), [WIDE], on_progress=load_newer)
    step.run()
    assert read_families(session) == {**FAMILIES, "p0": "New", "p4": "New"}


def test_a_lost_connection_is_an_error_that_says_what_is_left(
    database: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuilding, "BATCH_RESOURCES", 2)

    def end_the_connection(progress: RebuildProgress) -> None:
        with connect(database) as conn:
            conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid NOT IN (pg_backend_pid(), %s)",
                [session.info.backend_pid],
            )

    step = RebuildStep(lambda: connect(database, cipher=session.cipher), [WIDE], on_progress=end_the_connection)
    with pytest.raises(DatabaseUnavailable, match="run `fhir-assets migrate` again"):
        step.run()
    assert checkpoints.get_loaded_parts(session, "Patient", ["w"]) == {}
