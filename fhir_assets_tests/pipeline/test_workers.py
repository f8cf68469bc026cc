"""Worker processes: the same results in the same order, and an end with one sentence when one of them is killed."""

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
from fhir_assets.pipeline.workers.pool import UNIT_BYTES, WORTH_A_START, WorkerPool

LARGE = WORTH_A_START + 1


@pytest.fixture
def workers() -> Iterator[WorkerPool]:
    made = WorkerPool(2)
    yield made
    made.close()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def shouted(text: str) -> str:
    return text.upper()


def process_of(text: str) -> int:
    return os.getpid()


def refuse(text: str) -> str:
    raise StoreError("the part is damaged")


def choke(text: str) -> str:
    raise ValueError(f"could not read {text}")


def die(text: str) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return text


def chatter(text: str) -> str:
    print("something that a library prints")
    return text


@dataclass(frozen=True)
class Unpickled:
    """Says how often it was unpickled in its process."""

    seen = 0

    def __setstate__(self, state: dict[str, object]) -> None:
        type(self).seen += 1

    def __getstate__(self) -> dict[str, object]:
        return {"a": 1}

    def __call__(self, text: str) -> int:
        return self.seen


def run(workers: WorkerPool, job: Callable[[str], object], items: list[str], *, seconds: float = LARGE) -> list[object]:
    """A unit an item."""
    weighed = workers.map(job, enumerate(items), weigh=lambda _: UNIT_BYTES, seconds=seconds)
    found = []
    for place, (context, item, result) in enumerate(weighed):
        assert (context, item) == (place, items[place])
        found.append(result)
    return found


def test_results_come_in_order_from_several_processes(workers: WorkerPool) -> None:
    items = [f"line {n}" for n in range(50)]
    assert run(workers, shouted, items) == [item.upper() for item in items]
    processes: set[object] = set()
    deadline = time.monotonic() + 60
    # A busy machine may let the first process do everything before the second one has started.
    while len(processes) < 2 and time.monotonic() < deadline:
        processes |= set(run(workers, process_of, items))
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_little_work_starts_no_process_and_one_worker_is_none(workers: WorkerPool) -> None:
    before = children()
    assert run(workers, process_of, ["a", "b"], seconds=WORTH_A_START / 2) == [os.getpid()] * 2
    assert run(WorkerPool(1), process_of, ["a", "b"], seconds=1000) == [os.getpid()] * 2
    assert children() == before


def test_small_items_travel_together(workers: WorkerPool) -> None:
    weighed = workers.map(process_of, ((None, str(n)) for n in range(100)), weigh=lambda _: 10, seconds=LARGE)
    assert len({process for _, _, process in weighed}) == 1


def test_a_job_is_unpickled_once_a_worker(workers: WorkerPool) -> None:
    assert set(run(workers, Unpickled(), [str(n) for n in range(20)])) == {1}


def test_no_more_units_are_read_than_fit_in_flight(workers: WorkerPool) -> None:
    read = 0

    def items() -> Iterator[tuple[None, str]]:
        nonlocal read
        for n in range(100):
            read += 1
            yield None, str(n)

    results = workers.map(shouted, items(), weigh=lambda _: UNIT_BYTES, seconds=LARGE)
    next(results)
    assert read <= 6
    assert len(list(results)) == 99


def test_an_error_of_the_project_arrives_as_it_is(workers: WorkerPool) -> None:
    with pytest.raises(StoreError, match="the part is damaged"):
        run(workers, refuse, ["a"] * 10)
    assert run(workers, shouted, ["still there"]) == ["STILL THERE"]


def test_any_other_error_tells_type_and_place_but_not_what_it_choked_on(workers: WorkerPool) -> None:
    with pytest.raises(PermanentError, match=r"unexpected ValueError in test_workers.py, line \d+") as caught:
        run(workers, choke, ["Mrs Miller"])
    assert "Miller" not in str(caught.value)


def test_a_killed_worker_is_one_sentence_and_the_next_work_has_a_new_one(workers: WorkerPool) -> None:
    with pytest.raises(WorkerLost, match=r"killed by signal 9.*nothing of these windows is kept"):
        run(workers, die, ["a"] * 10)
    assert run(workers, shouted, ["again"] * 10) == ["AGAIN"] * 10


def test_a_worker_that_died_idle_is_replaced_without_a_word(workers: WorkerPool) -> None:
    for process in set(run(workers, process_of, ["a"] * 10)):
        assert isinstance(process, int)
        psutil.Process(process).kill()
        psutil.Process(process).wait()
    assert run(workers, shouted, ["a"] * 10) == ["A"] * 10


def test_what_a_worker_prints_does_not_get_between_its_answers(workers: WorkerPool) -> None:
    assert run(workers, chatter, ["a", "b"]) == ["a", "b"]


def test_workers_end_with_their_parent_even_if_it_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import os, time\n"
        "from fhir_assets.pipeline.workers.pool import UNIT_BYTES, Workers\n"
        "from fhir_assets_tests.pipeline.test_workers import LARGE, process_of\n"
        "found = Workers(2).map(process_of, enumerate('abcdefgh'), weigh=lambda _: UNIT_BYTES, seconds=LARGE)\n"
        "print(*{process for _, _, process in found}, flush=True)\n"
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


def test_the_judgement_is_the_same_in_a_worker(workers: WorkerPool) -> None:
    lines = [
        b'{"resourceType":"Patient","id":"a"}',
        b'{"resourceType":"Patient","id":"b","gender":"malee"}',
        b"{broken",
        b'{"resourceType":"Patient","id":"c","birthDate":"1980"}',
    ]
    judge = LineValidator(Validator(warn_rules=["required-binding"]))
    ((_, _, elsewhere),) = workers.map(judge, [(None, lines)], weigh=len, seconds=LARGE)
    assert elsewhere == judge(lines)
    assert [(place, issues[0].rule, issues[0].severity) for place, issues in elsewhere] == [
        (1, "required-binding", "warning"),
        (2, "json", "error"),
    ]
