"""Dagster's daemon in a process of its own, and backfills that it executes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import dagster as dg

from fhir_assets.orchestration.run_requests import UNFINISHED
from fhir_assets_tests.support.dagster_internals import BulkActionStatus, add_backfill


@contextmanager
def dagster_daemon(environment: Mapping[str, str], folder: Path, log: Path) -> Iterator[None]:
    """Run ``dagster-daemon`` with its own code server in ``folder`` during the block; then stop all its processes."""
    command = [str(Path(sys.executable).with_name("dagster-daemon")), "run", "--module-name", "fhir_assets.definitions"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield
            assert process.poll() is None
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    """Wait until a condition holds. Fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(1)


def backfill(
    instance: dg.DagsterInstance,
    definitions: dg.Definitions,
    partition_keys: Sequence[str],
    *,
    seconds: float,
) -> list[dg.DagsterRun]:
    """Backfill partitions of all three layers through the running daemon. Return the runs when all have ended."""
    backfill_id = uuid4().hex[:8]
    add_backfill(instance, definitions, partition_keys, backfill_id=backfill_id)

    def ended() -> bool:
        stored = instance.get_backfill(backfill_id)
        return stored is not None and stored.status not in (BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING)

    wait_until(ended, seconds=seconds)
    of_backfill = {"dagster/backfill": backfill_id}
    wait_until(
        lambda: instance.get_runs_count(dg.RunsFilter(tags=of_backfill, statuses=UNFINISHED)) == 0, seconds=seconds
    )
    return list(instance.get_runs(dg.RunsFilter(tags=of_backfill)))
