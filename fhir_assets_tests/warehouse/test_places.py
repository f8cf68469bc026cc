"""Places over real processes: never more at once than there are, and a dead process leaves none behind."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from threading import Barrier

import pytest

from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db.connections import Connection, connect
from fhir_assets.warehouse.postgres.db.semaphore import DistributedSemaphore, Kind

_CALLS = """
import sys
from fhir_assets.deployment.source import open_client
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.settings import load_settings
settings = load_settings()
with open_client(settings, Warehouse(settings)) as client:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(10):
        client.get("Patient?_summary=count", lambda answer: answer.status)
"""
_HOLDS = """
import sys, time
from functools import partial
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.db.semaphore import Kind, Places
with Places(partial(connect, sys.argv[1], autocommit=True), Kind.LOADERS, 1).one():
    print("held", flush=True)
    time.sleep(600)
"""


def places(url: str, limit: int, kind: Kind = Kind.CALLS) -> DistributedSemaphore:
    return DistributedSemaphore(partial(connect, url, autocommit=True), kind, limit)


@pytest.mark.parametrize("allowed", [1, 2])
def test_processes_call_the_server_so_often_at_once_as_allowed_and_never_more(database: str, allowed: int) -> None:
    with SandboxServer(faults=(Fault(kind=FaultKind.SLOW, seconds=0.02),)) as server:
        environment = {
            "DB_URL": database,
            "FHIR_BASE_URL": server.url,
            "FHIR_MAX_CONNECTIONS": str(allowed),
            "PATH": "",
        }
        command = [sys.executable, "-c", _CALLS]
        processes = [
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)
        ]
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process in processes:
            process.communicate(timeout=60)
        assert [process.returncode for process in processes] == [0, 0, 0]
        stats = server.stats()
    assert stats["requests"]["count"] == 30
    assert stats["max_in_flight"] == allowed


def test_threads_of_one_process_share_its_places(database: str) -> None:
    shared = places(database, 3)
    together = Barrier(3)

    def hold(_: int) -> None:
        with shared.one():
            together.wait(10)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(hold, range(6)))
    shared.close()


def test_a_killed_process_leaves_its_place_at_once(database: str) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDS, database], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        other = places(database, 1, Kind.LOADERS)
        assert other._take() is None
        process.kill()
    with other.one():
        pass
    other.close()


def test_kinds_do_not_stand_in_each_others_way(database: str) -> None:
    with ExitStack() as stack:
        for kind in Kind:
            each = places(database, 1, kind)
            stack.callback(each.close)
            stack.enter_context(each.one())


def test_a_place_is_given_back_when_what_was_done_there_failed(database: str, conn: Connection) -> None:
    one = places(database, 1)
    with pytest.raises(ZeroDivisionError), one.one():
        raise ZeroDivisionError
    held = conn.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s", [int(Kind.CALLS)])
    assert held.fetchall() == [(0,)]
    one.close()


def test_a_connection_that_broke_is_opened_again(database: str) -> None:
    one = places(database, 1)
    with one.one(), connect(database, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s",
            [int(Kind.CALLS)],
        )
        time.sleep(0.1)
    with one.one():
        pass
    one.close()
