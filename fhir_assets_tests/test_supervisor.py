"""A supervised process that exits is restarted, with a message; one that exits repeatedly ends the command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fhir_assets.cli.supervisor import MAX_SHORT_LIVES, Service, Supervisor
from fhir_assets.errors import ConfigurationError

pytestmark = pytest.mark.slow

SLEEP = "import time; time.sleep(600)"
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).wait(); {SLEEP}"


@pytest.fixture
def sentences() -> list[str]:
    return []


@pytest.fixture
def supervisor(sentences: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr("fhir_assets.cli.supervisor._CHECKS_WITHOUT_CHILD", 2)
    supervisor = Supervisor(os.environ, sentences.append)
    yield supervisor
    supervisor.stop()


def children() -> list[psutil.Process]:
    alive = psutil.Process().children(recursive=True)
    sleeping = [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in sleeping if child.cmdline()[-1:] in ([SLEEP], [PARENT])]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_process_is_started_again(supervisor: Supervisor, sentences: list[str]) -> None:
    supervisor.start(Service("The UI", [sys.executable, "-c", SLEEP]))
    (process,) = children()
    supervisor.check()
    assert sentences == []
    process.kill()
    wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    supervisor.check()
    (sentence,) = sentences
    assert sentence.startswith(f"The UI (process {process.pid}) was killed by signal 9 (SIGKILL)")
    assert sentence.endswith("restarting it")
    (second,) = children()
    assert second.pid != process.pid


SUPERVISOR = f"""
import os, sys
from fhir_assets.cli.supervisor import Service, Supervisor
supervisor = Supervisor(os.environ, print)
supervisor.start(Service("The UI", [sys.executable, "-c", {SLEEP!r}]))
print("started", flush=True)
supervisor.run()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal for it")
def test_the_processes_of_a_killed_supervisor_end() -> None:
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        (child,) = children()
        process.kill()
        assert psutil.wait_procs([child], timeout=60)[1] == []


def test_a_process_whose_child_is_killed_is_started_again(supervisor: Supervisor, sentences: list[str]) -> None:
    supervisor.start(Service("The code server", [sys.executable, "-c", PARENT], needs_child=True))
    wait_until(lambda: len(children()) == 2)
    parent, child = children()
    supervisor.check()
    child.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    for _ in range(2):
        supervisor.check()
    expected = f"The code server (process {parent.pid}) lost the process that does its work: restarting it"
    assert sentences == [expected]
    wait_until(lambda: len(children()) == 2)
    assert {parent.pid, child.pid} & {process.pid for process in children()} == set()


def test_a_process_whose_child_is_killed_between_two_checks_is_started_again(
    supervisor: Supervisor, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fhir_assets.cli.supervisor._CHECKS_BEFORE_CHILD", 3)
    supervisor.start(Service("The code server", [sys.executable, "-c", PARENT], needs_child=True))
    wait_until(lambda: len(children()) == 2)
    _, child = children()
    child.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    for _ in range(2):
        supervisor.check()
    assert sentences == [], "it may be starting"
    supervisor.check()
    assert len(sentences) == 1
    wait_until(lambda: len(children()) == 2)


def test_the_children_of_a_killed_process_end_with_it(supervisor: Supervisor, sentences: list[str]) -> None:
    supervisor.start(Service("The code server", [sys.executable, "-c", PARENT]))
    wait_until(lambda: len(children()) == 2)
    before = {process.pid for process in children()}
    os.kill(min(before), signal.SIGKILL)
    while not sentences:
        supervisor.check()
    wait_until(lambda: len(children()) == 2)
    assert before & {process.pid for process in children()} == set()


def test_a_process_that_never_stays_up_ends_the_command(supervisor: Supervisor, sentences: list[str]) -> None:
    supervisor.start(Service("The daemon", [sys.executable, "-c", "raise SystemExit(3)"]))

    def check_for_ever() -> None:
        while True:
            supervisor.check()

    with pytest.raises(ConfigurationError, match=r"The daemon ended with exit code 3 5 times .*: its messages"):
        check_for_ever()
    assert len(sentences) == MAX_SHORT_LIVES - 1


def test_an_optional_process_that_never_stays_up_is_left_out(supervisor: Supervisor, sentences: list[str]) -> None:
    supervisor.start(Service("The dashboard", [sys.executable, "-c", "raise SystemExit(3)"], optional=True))
    supervisor.start(Service("The UI", [sys.executable, "-c", SLEEP]))
    while not sentences or "goes on without it" not in sentences[-1]:
        supervisor.check()
    assert len(sentences) == MAX_SHORT_LIVES
    assert sentences[-1].startswith("The dashboard ended with exit code 3 5 times")
    (process,) = children()
    process.kill()
    while len(sentences) == MAX_SHORT_LIVES:
        supervisor.check()
    assert sentences[-1].startswith("The UI"), "the other processes are still supervised"


def test_stop_ends_all_processes(supervisor: Supervisor, tmp_path: Path) -> None:
    for name in ("one", "two"):
        supervisor.start(Service(name, [sys.executable, "-c", PARENT]))
    wait_until(lambda: len(children()) == 4)
    supervisor.stop()
    assert children() == []
