"""Worker processes: results in order, bounded memory, and the end of a worker or of its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fhir_assets.errors import PermanentError, StoreError, WorkerLost
from fhir_assets.fhir.validation import Validator
from fhir_assets.pipeline.validate.step import LineValidator
from fhir_assets.pipeline.workers.pool import MIN_SECONDS_TO_START, UNIT_BYTES, WorkerPool
from fhir_assets_tests.support.worker_jobs import process_of

LARGE = MIN_SECONDS_TO_START + 1


@pytest.fixture
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool(2)
    yield pool
    pool.close()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def upper(text: str) -> str:
    return text.upper()


def refuse(text: str) -> str:
    raise StoreError("the part is damaged")


def fail(text: str) -> str:
    raise ValueError(f"could not read {text}")


def die(text: str) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return text


def print_text(text: str) -> str:
    print("something that a library prints")
    return text


@dataclass(frozen=True)
class Unpickled:
    """Counts how often it was unpickled in its process."""

    seen = 0

    def __setstate__(self, state: dict[str, object]) -> None:
        type(self).seen += 1

    def __getstate__(self) -> dict[str, object]:
        return {"a": 1}

    def __call__(self, text: str) -> int:
        return self.seen


def run(workers: WorkerPool, job: Callable[[str], object], items: list[str], *, seconds: float = LARGE) -> list[object]:
    """Run a job with one unit for each item."""
    triples = workers.map(job, enumerate(items), weigh=lambda _: UNIT_BYTES, seconds=seconds)
    results = []
    for index, (context, item, result) in enumerate(triples):
        assert (context, item) == (index, items[index])
        results.append(result)
    return results


def test_results_come_in_order_from_several_processes(workers: WorkerPool) -> None:
    items = [f"line {n}" for n in range(50)]
    assert run(workers, upper, items) == [item.upper() for item in items]
    processes: set[object] = set()
    deadline = time.monotonic() + 60
    # A busy machine may let the first process do everything before the second one has started.
    while len(processes) < 2 and time.monotonic() < deadline:
        processes |= set(run(workers, process_of, items))
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_little_work_or_a_count_of_one_starts_no_process(workers: WorkerPool) -> None:
    before = children()
    assert run(workers, process_of, ["a", "b"], seconds=MIN_SECONDS_TO_START / 2) == [os.getpid()] * 2
    assert run(WorkerPool(1), process_of, ["a", "b"], seconds=1000) == [os.getpid()] * 2
    assert children() == before


def test_small_items_share_a_unit(workers: WorkerPool) -> None:
    results = workers.map(process_of, ((None, str(n)) for n in range(100)), weigh=lambda _: 10, seconds=LARGE)
    assert len({process for _, _, process in results}) == 1


def test_a_job_is_unpickled_once_in_each_worker(workers: WorkerPool) -> None:
    assert set(run(workers, Unpickled(), [str(n) for n in range(20)])) == {1}


def test_no_more_units_are_read_than_fit_in_flight(workers: WorkerPool) -> None:
    read = 0

    def items() -> Iterator[tuple[None, str]]:
        nonlocal read
        for n in range(100):
            read += 1
            yield None, str(n)

    results = workers.map(upper, items(), weigh=lambda _: UNIT_BYTES, seconds=LARGE)
    next(results)
    assert read <= 6
    assert len(list(results)) == 99


def test_an_error_of_the_project_is_raised_unchanged(workers: WorkerPool) -> None:
    with pytest.raises(StoreError, match="the part is damaged"):
        run(workers, refuse, ["a"] * 10)
    assert run(workers, upper, ["still there"]) == ["STILL THERE"]


def test_any_other_error_has_its_type_and_location_but_not_its_message(workers: WorkerPool) -> None:
    with pytest.raises(PermanentError, match=r"unexpected ValueError in test_workers.py, line \d+") as exc_info:
        run(workers, fail, ["Mrs Miller"])
    assert "Miller" not in str(exc_info.value)


def test_a_killed_worker_raises_worker_lost_and_the_next_work_starts_a_new_worker(workers: WorkerPool) -> None:
    with pytest.raises(WorkerLost, match=r"was killed by signal 9 \(SIGKILL\).*These windows are unchanged"):
        run(workers, die, ["a"] * 10)
    assert run(workers, upper, ["again"] * 10) == ["AGAIN"] * 10


def test_a_worker_that_was_killed_while_idle_is_replaced(workers: WorkerPool) -> None:
    for process in set(run(workers, process_of, ["a"] * 10)):
        assert isinstance(process, int)
        psutil.Process(process).kill()
        psutil.Process(process).wait()
    assert run(workers, upper, ["a"] * 10) == ["A"] * 10


def test_printed_text_of_a_worker_does_not_disturb_its_results(workers: WorkerPool) -> None:
    assert run(workers, print_text, ["a", "b"]) == ["a", "b"]


def test_workers_end_with_their_parent_even_if_it_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import os, time\n"
        "from fhir_assets.pipeline.workers.pool import UNIT_BYTES, WorkerPool\n"
        "from fhir_assets_tests.support.worker_jobs import process_of\n"
        "results = WorkerPool(2).map(process_of, enumerate('abcdefgh'), weigh=lambda _: UNIT_BYTES, seconds=2)\n"
        "print(*{process for _, _, process in results}, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        processes = [int(pid) for pid in parent.stdout.readline().split()]
        assert processes
        parent.kill()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in processes):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_validation_gives_the_same_issues_in_a_worker(workers: WorkerPool) -> None:
    lines = [
        b'{"resourceType":"Patient","id":"a"}',
        b'{"resourceType":"Patient","id":"b","gender":"malee"}',
        b"{broken",
        b'{"resourceType":"Patient","id":"c","birthDate":"1980"}',
    ]
    validator = LineValidator(Validator(warn_rules=["required-binding"]))
    ((_, _, from_worker),) = workers.map(validator, [(None, lines)], weigh=len, seconds=LARGE)
    assert from_worker == validator(lines)
    assert [(index, issues[0].rule, issues[0].severity) for index, issues in from_worker] == [
        (1, "required-binding", "warning"),
        (2, "json", "error"),
    ]
