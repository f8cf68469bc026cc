"""Borrowed sessions are reused, and have the same state as new sessions."""

import os
from contextlib import AbstractContextManager, ExitStack, suppress
from threading import Thread

import psycopg
import pytest

from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db import connection_cache
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, borrow_session, connect


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    connection_cache.CONNECTION_CACHE.clear()


def borrow(url: str) -> AbstractContextManager[Session]:
    return borrow_session(url, cipher=NO_ENCRYPTION)


def backend_pid(conn: Connection) -> int:
    return conn.info.backend_pid


def test_a_connection_is_reused_and_nested_requests_get_their_own(database: str) -> None:
    with borrow(database) as first:
        pid = backend_pid(first)
        with borrow(database) as nested:
            assert backend_pid(nested) != pid
    for _ in range(3):
        with borrow(database) as again:
            assert backend_pid(again) == pid


def test_the_end_of_the_block_commits_and_an_error_rolls_back(database: str) -> None:
    with borrow(database) as conn:
        conn.execute("CREATE TABLE kept (n int)")
    with suppress(ZeroDivisionError), borrow(database) as conn:
        conn.execute("INSERT INTO kept VALUES (1)")
        raise ZeroDivisionError
    with borrow(database) as conn:
        assert conn.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_locks_settings_temporary_tables_and_autocommit_end_with_the_block(database: str) -> None:
    with borrow(database) as conn:
        pid = backend_pid(conn)
        conn.autocommit = True
        conn.execute("SELECT pg_advisory_lock(42)")
        conn.execute("SET work_mem = '64kB'")
        conn.execute("CREATE TEMPORARY TABLE scratch (n int)")
        conn.execute("LISTEN something")
    with borrow(database) as conn, connect(database) as other:
        assert backend_pid(conn) == pid
        assert not conn.autocommit
        assert other.execute("SELECT pg_try_advisory_lock(42)").fetchone() == (True,)
        assert conn.execute("SHOW timezone").fetchone() == ("UTC",)
        assert conn.execute("SHOW work_mem").fetchone() != ("64kB",)
        assert conn.execute("SELECT to_regclass('pg_temp.scratch')").fetchone() == (None,)
        assert conn.execute("SELECT count(*) FROM pg_listening_channels()").fetchone() == (0,)


def test_a_table_that_was_altered_in_between_is_read_with_its_new_columns(database: str) -> None:
    with borrow(database) as conn, connect(database) as other:
        other.execute("CREATE TABLE widened (n int)")
        other.commit()
        for _ in range(10):
            conn.execute("SELECT * FROM widened").fetchall()
        conn.commit()
        other.execute("ALTER TABLE widened ADD m int")
        other.commit()
        assert [column.name for column in conn.execute("SELECT * FROM widened").description or ()] == ["n", "m"]


def test_an_idle_connection_that_the_server_closed_is_replaced(database: str) -> None:
    with borrow(database) as conn:
        pid = backend_pid(conn)
    with connect(database, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    with borrow(database) as conn:
        assert backend_pid(conn) != pid
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_a_connection_that_fails_in_use_is_closed(database: str) -> None:
    with connect(database, autocommit=True) as other, suppress(psycopg.OperationalError), borrow(database) as conn:
        pid = backend_pid(conn)
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        conn.execute("SELECT 1")
    assert conn.closed
    with borrow(database) as conn:
        assert backend_pid(conn) != pid


def test_a_connection_that_was_closed_in_the_block_is_not_reused(database: str) -> None:
    with borrow(database) as conn:
        conn.close()
    with borrow(database) as first, borrow(database) as second:
        assert backend_pid(first) != backend_pid(second)
        assert first is not conn
        assert second is not conn


def test_at_most_max_idle_connections_are_kept(database: str) -> None:
    with ExitStack() as stack:
        for _ in range(connection_cache.MAX_IDLE + 3):
            stack.enter_context(borrow(database))
    with connect(database) as other:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        while (row := other.execute(query).fetchone()) and row[0] > connection_cache.MAX_IDLE:
            other.rollback()
    assert row == (connection_cache.MAX_IDLE,)


def test_a_connection_that_was_idle_too_long_is_closed(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with borrow(database) as conn:
        pid = backend_pid(conn)
    monkeypatch.setattr(connection_cache, "MAX_IDLE_SECONDS", -1)
    with borrow(database) as conn:
        assert backend_pid(conn) != pid


def test_a_forked_child_does_not_use_the_connections_of_its_parent(database: str) -> None:
    with borrow(database) as conn:
        pid = backend_pid(conn)
    child = os.fork()
    if child == 0:
        try:
            with borrow(database) as conn:
                os._exit(0 if backend_pid(conn) != pid else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with borrow(database) as conn:
        assert backend_pid(conn) == pid
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_threads_never_share_a_connection(database: str) -> None:
    shared = []

    def work() -> None:
        for _ in range(50):
            with borrow(database) as conn:
                conn.execute("SELECT set_config('fhir_assets.mine', %s, false)", [str(id(conn))])
                if conn.execute("SELECT current_setting('fhir_assets.mine')").fetchone() != (str(id(conn)),):
                    shared.append(conn)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not shared
