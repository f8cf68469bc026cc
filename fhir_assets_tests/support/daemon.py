"""Dagster's own daemon in a process of its own, and a backfill as somebody launches it in the UI."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.utils import make_new_backfill_id

from fhir_assets.orchestration.run_requests import UNFINISHED

LAYERS = ("raw", "validated", "normalized")


@contextmanager
def dagster_daemon(environment: Mapping[str, str], folder: Path, log: Path) -> Iterator[None]:
    """Runs ``dagster-daemon`` with a code server of its own in ``folder``; nothing of it is left afterwards."""
    command = [sys.executable, "-m", "dagster._daemon", "run", "--module-name", "fhir_assets.definitions"]
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


def until(holds: Callable[[], bool], *, seconds: float) -> None:
    """Wait for something that the daemon does by itself."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the daemon did not get there"
        time.sleep(1)


def backfill(
    instance: dg.DagsterInstance,
    definitions: dg.Definitions,
    partition_keys: Sequence[str],
    *,
    seconds: float,
) -> list[dg.DagsterRun]:
    """Backfill these partitions of all three layers through the daemon, which runs; its runs when all is over."""
    backfill_id = make_new_backfill_id()
    graph = definitions.get_repository_def().asset_graph
    instance.add_backfill(
        PartitionBackfill.from_asset_partitions(
            backfill_id=backfill_id,
            asset_graph=graph,
            partition_names=partition_keys,
            asset_selection=[key for key in graph.materializable_asset_keys if key.path[0] in LAYERS],
            backfill_timestamp=time.time(),
            tags={},
            dynamic_partitions_store=instance,
            all_partitions=False,
            title=None,
            description=None,
            run_config=None,
        )
    )

    def over() -> bool:
        found = instance.get_backfill(backfill_id)
        return found is not None and found.status not in (BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING)

    until(over, seconds=seconds)
    of_backfill = {"dagster/backfill": backfill_id}
    until(lambda: instance.get_runs_count(dg.RunsFilter(tags=of_backfill, statuses=UNFINISHED)) == 0, seconds=seconds)
    return list(instance.get_runs(dg.RunsFilter(tags=of_backfill)))
