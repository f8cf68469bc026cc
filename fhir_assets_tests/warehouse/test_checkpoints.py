"""Checkpoints move only forward and never over a gap; loaded parts are recorded by partition."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.postgres.db.connections import Connection

START = datetime(2024, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


@dataclass(frozen=True)
class Part:
    name: str
    rows: int


def loaded_until(conn: Connection) -> datetime:
    return checkpoints.get(conn, ["Patient"])["Patient"].loaded_until


def read_checkpoints(conn: Connection, *resource_types: str) -> dict[str, tuple[datetime, str | None]]:
    by_type = checkpoints.get(conn, resource_types)
    return {name: (checkpoint.loaded_until, checkpoint.source_state) for name, checkpoint in by_type.items()}


def test_a_type_has_no_checkpoint_before_it_begins(conn: Connection) -> None:
    assert checkpoints.get(conn, ["Patient"]) == {}
    assert not checkpoints.advance(conn, "Patient", START, START + DAY, "run")
    checkpoints.begin(conn, ["Patient", "Claim"], START, source_state="files 1")
    assert read_checkpoints(conn, "Patient", "Goal") == {"Patient": (START, "files 1")}


def test_only_consecutive_windows_move_a_checkpoint(conn: Connection) -> None:
    checkpoints.begin(conn, ["Patient"], START, source_state=None)
    assert checkpoints.advance(conn, "Patient", START, START + DAY, "run")
    assert not checkpoints.advance(conn, "Patient", START + 2 * DAY, START + 3 * DAY, "run")
    assert not checkpoints.advance(conn, "Patient", START - DAY, START, "run")
    assert loaded_until(conn) == START + DAY
    assert checkpoints.advance(conn, "Patient", None, START + 2 * DAY, "run")
    assert loaded_until(conn) == START + 2 * DAY


def test_only_begin_moves_a_checkpoint_back(conn: Connection) -> None:
    checkpoints.begin(conn, ["Patient"], START + DAY, source_state="files 1")
    checkpoints.begin(conn, ["Patient"], START, source_state="files 2")
    assert read_checkpoints(conn, "Patient") == {"Patient": (START, "files 2")}


def test_the_loaded_parts_of_a_partition_are_replaced(conn: Connection) -> None:
    checkpoints.record_loaded_parts(conn, "one", "Patient", {"w": [Part("a", 1), Part("b", 2)], "v": [Part("c", 3)]})
    checkpoints.record_loaded_parts(conn, "two", "Patient", {"w": [Part("b", 2), Part("d", 4)]})
    assert checkpoints.get_loaded_parts(conn, "Patient", ["v", "w", "x"]) == {
        "w": frozenset({"b", "d"}),
        "v": frozenset({"c"}),
    }
    checkpoints.record_loaded_parts(conn, "two", "Patient", {"w": []})
    assert checkpoints.get_loaded_parts(conn, "Patient", ["w"]) == {}
    checkpoints.record_loaded_parts(conn, "two", "Patient", {})
    checkpoints.remove_loaded_parts(conn, "Patient")
    assert checkpoints.get_loaded_parts(conn, "Patient", ["v"]) == {}
