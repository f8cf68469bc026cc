"""A connection that was given back is used again, and nobody can tell it from a new one."""

import os
from threading import Thread

import psycopg
import pytest

from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db import connection_cache
from fhir_assets.warehouse.postgres.db.connections import Connection, borrow, connect


@pytest.fixture(autouse=True)
def none_left() -> None:
    connection_cache.CONNECTION_CACHE.clear()


def backend(conn: Connection) -> int:
    return conn.info.backend_pid


def test_the_same_connection_serves_one_after_the_other_and_nested_askers_get_their_own(database: str) -> None:
    with borrow(database, cipher=NO_ENCRYPTION) as first:
        pid = backend(first)
        with borrow(database, cipher=NO_ENCRYPTION) as nested:
            assert backend(nested) != pid
    for _ in range(3):
        with borrow(database, cipher=NO_ENCRYPTION) as again:
            assert backend(again) == pid


def test_what_was_not_committed_is_gone_and_what_was_is_there(database: str) -> None:
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        conn.execute("CREATE TABLE kept (n int)")
    conn = borrow(database, cipher=NO_ENCRYPTION)
    conn.execute("INSERT INTO kept VALUES (1)")
    conn.close()
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        assert conn.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_locks_settings_temporary_tables_and_autocommit_end_with_the_use(database: str) -> None:
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        pid = backend(conn)
        conn.autocommit = True
        conn.execute("SELECT pg_advisory_lock(42)")
        conn.execute("SET work_mem = '64kB'")
        conn.execute("CREATE TEMPORARY TABLE scratch (n int)")
        conn.execute("LISTEN something")
    with borrow(database, cipher=NO_ENCRYPTION) as conn, connect(database) as other:
        assert backend(conn) == pid
        assert not conn.autocommit
        assert other.execute("SELECT pg_try_advisory_lock(42)").fetchone() == (True,)
        assert conn.execute("SHOW timezone").fetchone() == ("UTC",)
        assert conn.execute("SHOW work_mem").fetchone() != ("64kB",)
        assert conn.execute("SELECT to_regclass('pg_temp.scratch')").fetchone() == (None,)
        assert conn.execute("SELECT count(*) FROM pg_listening_channels()").fetchone() == (0,)


def test_a_table_that_changed_meanwhile_is_read_as_it_is_now(database: str) -> None:
    with borrow(database, cipher=NO_ENCRYPTION) as conn, connect(database) as other:
        other.execute("CREATE TABLE widened (n int)")
        other.commit()
        for _ in range(10):
            conn.execute("SELECT * FROM widened").fetchall()
        conn.commit()
        other.execute("ALTER TABLE widened ADD m int")
        other.commit()
        assert [column.name for column in conn.execute("SELECT * FROM widened").description or ()] == ["n", "m"]


def test_one_that_the_server_ended_is_replaced(database: str) -> None:
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        pid = backend(conn)
    with connect(database, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        assert backend(conn) != pid
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_one_that_broke_in_use_is_not_kept(database: str) -> None:
    with connect(database, autocommit=True) as other:
        conn = borrow(database, cipher=NO_ENCRYPTION)
        pid = backend(conn)
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")
        conn.close()
    assert conn.closed
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        assert backend(conn) != pid


def test_closed_twice_it_serves_nobody_twice(database: str) -> None:
    conn = borrow(database, cipher=NO_ENCRYPTION)
    conn.close()
    conn.close()
    with borrow(database, cipher=NO_ENCRYPTION) as first, borrow(database, cipher=NO_ENCRYPTION) as second:
        assert backend(first) != backend(second)


def test_no_more_wait_than_there_is_room(database: str) -> None:
    for conn in [borrow(database, cipher=NO_ENCRYPTION) for _ in range(connection_cache.ROOM + 3)]:
        conn.close()
    with connect(database) as other:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        while (found := other.execute(query).fetchone()) and found[0] > connection_cache.ROOM:
            other.rollback()
    assert found == (connection_cache.ROOM,)


def test_one_that_waited_too_long_is_closed(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        pid = backend(conn)
    monkeypatch.setattr(connection_cache, "SECONDS", -1)
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        assert backend(conn) != pid


def test_a_forked_child_leaves_its_parent_s_connections_alone(database: str) -> None:
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        pid = backend(conn)
    child = os.fork()
    if child == 0:
        try:
            with borrow(database, cipher=NO_ENCRYPTION) as conn:
                os._exit(0 if backend(conn) != pid else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with borrow(database, cipher=NO_ENCRYPTION) as conn:
        assert backend(conn) == pid
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_threads_never_share_one(database: str) -> None:
    wrong = []

    def work() -> None:
        for _ in range(50):
            with borrow(database, cipher=NO_ENCRYPTION) as conn:
                conn.execute("SELECT set_config('fhir_assets.mine', %s, false)", [str(id(conn))])
                if conn.execute("SELECT current_setting('fhir_assets.mine')").fetchone() != (str(id(conn)),):
                    wrong.append(conn)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
