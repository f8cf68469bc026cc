"""The distributed semaphore over real processes: the limit holds, and a dead process frees its slots."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from threading import Barrier

import pytest

from fhir_assets.sandbox.faults import Fault, FaultKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import Connection, connect
from fhir_assets.warehouse.postgres.db.semaphore import DistributedSemaphore

_CALL_THE_SERVER = """
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
_HOLD_A_SLOT = """
import sys, time
from functools import partial
from fhir_assets.warehouse.postgres.db import advisory_locks
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.db.semaphore import DistributedSemaphore
open_connection = partial(connect, sys.argv[1], autocommit=True)
with DistributedSemaphore(open_connection, advisory_locks.TABLE_LOADS, 1).slot():
    print("held", flush=True)
    time.sleep(600)
"""


def semaphore(url: str, limit: int, lock_key: int = advisory_locks.SOURCE_CALLS) -> closing[DistributedSemaphore]:
    return closing(DistributedSemaphore(partial(connect, url, autocommit=True), lock_key, limit))


@pytest.mark.parametrize("limit", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_together_reach_the_limit_of_calls_and_never_exceed_it(database: str, limit: int) -> None:
    with SandboxServer(faults=(Fault(kind=FaultKind.SLOW, seconds=0.02),)) as server:
        environment = {
            "DB_URL": database,
            "FHIR_BASE_URL": server.url,
            "FHIR_MAX_CONNECTIONS": str(limit),
            "PATH": "",
        }
        command = [sys.executable, "-c", _CALL_THE_SERVER]
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
    assert stats["max_in_flight"] == limit


def test_threads_of_one_process_share_its_slots(database: str) -> None:
    barrier = Barrier(3)
    with semaphore(database, 3) as shared, ThreadPoolExecutor(6) as pool:

        def hold(_: int) -> None:
            with shared.slot():
                barrier.wait(10)

        list(pool.map(hold, range(6)))


def test_a_killed_process_frees_its_slot_immediately(database: str) -> None:
    with (
        subprocess.Popen([sys.executable, "-c", _HOLD_A_SLOT, database], stdout=subprocess.PIPE) as process,
        semaphore(database, 1, advisory_locks.TABLE_LOADS) as other,
    ):
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        assert other.try_acquire() is None
        process.kill()
        with other.slot():
            pass


def test_slots_of_different_keys_are_independent(database: str) -> None:
    with ExitStack() as stack:
        for lock_key in (advisory_locks.SOURCE_CALLS, advisory_locks.TABLE_LOADS):
            stack.enter_context(stack.enter_context(semaphore(database, 1, lock_key)).slot())


def test_a_slot_is_released_when_the_block_raises(database: str, conn: Connection) -> None:
    with semaphore(database, 1) as calls:
        with pytest.raises(ZeroDivisionError), calls.slot():
            raise ZeroDivisionError
        held = conn.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s", [advisory_locks.SOURCE_CALLS]
        )
        assert held.fetchall() == [(0,)]


def test_a_broken_connection_is_replaced(database: str) -> None:
    with semaphore(database, 1) as calls:
        with calls.slot(), connect(database, autocommit=True) as admin:
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s",
                [advisory_locks.SOURCE_CALLS],
            )
            time.sleep(0.1)
        with calls.slot():
            pass
