"""The clock by which arrivals are dated is that of the database's server, and never goes back."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.db.database_clock import DatabaseClock

START = datetime(2024, 1, 5, 12, tzinfo=UTC)


class Server:
    """A server whose clock a test sets, and the seconds of this machine's monotonic clock."""

    def __init__(self) -> None:
        self.now: datetime | None = START
        self.elapsed = 0.0
        self.asked = 0

    @contextmanager
    def connect(self) -> Iterator["Server"]:
        if self.now is None:
            raise DatabaseUnavailable("it does not answer")
        yield self

    def execute(self, _: str) -> "Server":
        self.asked += 1
        return self

    def fetchone(self) -> tuple[datetime]:
        assert self.now is not None
        return (self.now.replace(tzinfo=None),)


def build_clock(server: Server) -> DatabaseClock:
    return DatabaseClock(server.connect, elapsed=lambda: server.elapsed)  # type: ignore[arg-type]


def test_it_is_the_time_of_the_server(database: str) -> None:
    def open_session() -> Session:
        return connect(database, cipher=NO_ENCRYPTION)

    clock = DatabaseClock(open_session)
    with open_session() as conn:
        (before,) = conn.execute("SELECT clock_timestamp()").fetchone() or ()
        now = clock()
        (after,) = conn.execute("SELECT clock_timestamp()").fetchone() or ()
    assert before <= now <= after + timedelta(seconds=1)
    assert now.tzinfo is UTC


def test_between_two_questions_the_monotonic_clock_counts() -> None:
    server = Server()
    clock = build_clock(server)
    assert clock() == START
    server.elapsed = 7.5
    assert clock() == START + timedelta(seconds=7.5)
    assert server.asked == 1


def test_the_server_is_asked_again_after_a_minute() -> None:
    server = Server()
    clock = build_clock(server)
    clock()
    server.elapsed, server.now = 61.0, START + timedelta(seconds=63)
    assert clock() == START + timedelta(seconds=63)


def test_it_does_not_go_back_when_the_server_is_another_one_with_a_slower_clock() -> None:
    server = Server()
    clock = build_clock(server)
    latest = clock()
    server.elapsed, server.now = 61.0, START - timedelta(hours=1)
    assert clock() == latest
    server.elapsed, server.now = 122.0, START + timedelta(seconds=122)
    assert clock() == START + timedelta(seconds=122)


def test_a_server_that_does_not_answer_is_told() -> None:
    server = Server()
    server.now = None
    with pytest.raises(DatabaseUnavailable):
        build_clock(server)()
