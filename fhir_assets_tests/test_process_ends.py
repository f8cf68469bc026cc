"""Sentences about processes that ended, with real processes, signals and a real out-of-memory killer."""

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from fhir_assets.errors import OutOfResources
from fhir_assets.foreign_errors import translate_error
from fhir_assets.orchestration.run_ends import explain_lost_lock
from fhir_assets.process_ends import (
    OUT_OF_MEMORY_EXIT_CODE,
    MemoryKills,
    ProcessIdentity,
    describe_exit,
    exists,
    read_identity,
    read_memory_kills,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what its out-of-memory killer ends")


def end(code: str) -> int:
    """Return the exit code of a Python process."""
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode


KILL = "import os; os.kill(os.getpid(), 9)"


def raise_signal(number: int) -> str:
    return f"import os, signal; signal.signal({number}, signal.SIG_DFL); os.kill(os.getpid(), {number})"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (raise_signal(signal.SIGTERM), r"was ended by signal 15 \(SIGTERM\): an operator, or the system that runs it"),
        (raise_signal(signal.SIGHUP), r"was ended by signal 1 \(SIGHUP\): its terminal was closed"),
        (raise_signal(signal.SIGSEGV), r"crashed with signal 11 \(SIGSEGV\): a library in C failed"),
        ("import sys; sys.exit(3)", r"ended with exit code 3 of its own: see the log"),
        ("pass", r"ended with exit code 0, although its work was not done"),
        ("import os; os._exit(137)", r"was killed by exit code 137, which is signal 9 \(SIGKILL\)"),
        (f"import os; os._exit({OUT_OF_MEMORY_EXIT_CODE})", r"because it got no memory: .*FHIR_WORKERS"),
    ],
)
def test_an_exit_code_has_a_reason_and_says_what_to_do(code: str, told: str) -> None:
    assert re.search(told, describe_exit(end(code)))


def test_a_signal_without_a_name_is_named_by_its_number() -> None:
    assert describe_exit(-250).startswith("was ended by signal 250")


@LINUX
def test_a_kill_without_the_out_of_memory_killer_says_so() -> None:
    before = read_memory_kills()
    assert "but not by the kernel's out-of-memory killer" in describe_exit(end(KILL), before=before)


def test_without_the_counters_of_the_kernel_a_kill_is_not_explained() -> None:
    told = describe_exit(-9, before=MemoryKills())
    assert "if the kernel's log (`journalctl -k`) names it" in told
    assert "not by" not in told


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group with at most 300 MB; skipped where this account may create none."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    name = f"oom-{uuid4().hex[:8]}"
    if "memory" in own:
        group = Path(f"/sys/fs/cgroup/memory{own['memory']}/{name}")
        limit = group / "memory.limit_in_bytes"
    else:
        group = Path(f"/sys/fs/cgroup{own.get('', '')}/{name}")
        limit = group / "memory.max"
    try:
        group.mkdir()
        limit.write_text(str(300 * 2**20))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group with a limit can be created here: {error}")
    yield group
    group.rmdir()


WORKERS_WITHOUT_MEMORY = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
from fhir_assets.errors import FhirAssetsError
from fhir_assets.pipeline.workers.pool import UNIT_BYTES, WorkerPool
from fhir_assets_tests.support.worker_jobs import allocate
try:
    list(WorkerPool(2).map(allocate, [(None, "600")] * 4, weigh=lambda _: UNIT_BYTES, seconds=60))
except FhirAssetsError as error:
    print(type(error).__name__, error)
"""


@LINUX
def test_a_worker_that_the_out_of_memory_killer_ends_names_it(memory_group: Path) -> None:
    command = [sys.executable, "-c", WORKERS_WITHOUT_MEMORY, str(memory_group / "cgroup.procs")]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    assert told.startswith("WorkerLost a worker process was killed by signal 9 (SIGKILL) by the kernel's out-of-memory")
    assert "whose counter for its control group has risen" in told
    assert "FHIR_WORKERS" in told


LIMITED_WORKER = """
from fhir_assets.errors import FhirAssetsError
from fhir_assets.pipeline.workers.pool import WorkerProcess
import pickle
from fhir_assets_tests.support.worker_jobs import allocate_above_limit
answer = WorkerProcess().ask(pickle.dumps(allocate_above_limit), ["600"])
print(type(answer).__name__, answer)
"""


@LINUX
def test_a_process_that_gets_no_memory_and_goes_on_says_what_to_do() -> None:
    told = subprocess.run([sys.executable, "-c", LIMITED_WORKER], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert told.startswith("OutOfResources the process got no memory")
    assert "FHIR_WINDOWS_PER_RUN" in told
    assert isinstance(translate_error(MemoryError()), OutOfResources)


LARGE_REQUEST = """
import pickle, resource
from fhir_assets.errors import WorkerLost
from fhir_assets.pipeline.workers.pool import WorkerProcess
from fhir_assets_tests.support.worker_jobs import limit_memory
worker = WorkerProcess()
worker.ask(pickle.dumps(limit_memory), ["50"])
try:
    worker.ask(pickle.dumps(limit_memory), ["x" * 200_000_000])
except WorkerLost as error:
    print(error)
"""


@LINUX
def test_a_worker_without_memory_for_its_request_says_so() -> None:
    told = subprocess.run([sys.executable, "-c", LARGE_REQUEST], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert f"exit code {OUT_OF_MEMORY_EXIT_CODE}, because it got no memory" in told


@pytest.fixture
def dead() -> ProcessIdentity:
    """A process of this machine that has ended."""
    code = (
        "import pickle, sys; from fhir_assets.process_ends import read_identity; "
        "sys.stdout.buffer.write(pickle.dumps(read_identity()))"
    )
    identity = pickle.loads(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
    assert isinstance(identity, ProcessIdentity)
    return identity


@LINUX
def test_a_lost_lock_is_explained_by_what_is_known_of_the_process(dead: ProcessIdentity) -> None:
    me = read_identity()
    begun = datetime.now(UTC)
    assert exists(me) is True
    assert exists(dead) is False
    assert exists(replace(me, boot="other")) is None
    assert f"its process (process {os.getpid()} on {me.host}) still runs" in explain_lost_lock(me)
    assert "It was not the kernel's out-of-memory killer" in explain_lost_lock(dead)
    killed = replace(dead, kills=MemoryKills((dead.kills.machine or 0) - 1))
    assert "out-of-memory killer has killed a process of this machine since the run began" in explain_lost_lock(killed)
    assert "because the machine was restarted" in explain_lost_lock(replace(dead, boot="other"))
    elsewhere = explain_lost_lock(replace(dead, boot="other", host="worker-7"))
    assert f"(process {dead.pid} on worker-7) no longer holds its lock in Postgres" in elsewhere
    assert "kubectl describe pod" in elsewhere
    restarted = explain_lost_lock(dead, begun=begun, postgres_started=begun + timedelta(minutes=1))
    assert "Postgres was restarted at " in restarted
    assert "Postgres was restarted" not in explain_lost_lock(dead, begun=begun, postgres_started=begun - timedelta(1))
    assert "before it could say where it runs" in explain_lost_lock(None)
