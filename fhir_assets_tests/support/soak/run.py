"""One soak: traffic beside the steps of a plan, then the question whether anything was lost."""

import random
import statistics
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import DatabaseUnavailable
from fhir_assets_tests.support.soak.deployment import Deployment, judge_command
from fhir_assets_tests.support.soak.faults import FAULTS
from fhir_assets_tests.support.soak.plan import Step
from fhir_assets_tests.support.soak.traffic import Traffic

_SAMPLE_SECONDS = 30.0
_ACTION_SECONDS = 0.25
_SETTLE_SECONDS = 1200.0
_COMMAND_SECONDS = 600.0
_START_SECONDS = 25.0
_GROWTH = 1.25
"""How many times its memory of the second quarter a process may use in the last one, beside 50 MiB."""

_COMMANDS = (
    ("dead-letters", "replay"),
    ("prune", "--apply"),
    ("consents", "apply"),
    ("landing", "load"),
    ("migrate",),
    ("reconcile",),
    ("status",),
    ("audit", "verify"),
)
"""Commands that people and cron jobs run beside a deployment."""


class Soak:
    """A deployment in ``folder`` with its traffic. With ``exposed``, every fault can be tried and commands run.

    An odd seed keeps the store in a bucket, an even one on a disk.
    """

    def __init__(self, folder: Path, seed: int, steps: Sequence[Step], *, exposed: bool) -> None:
        self._deployment = Deployment(folder, exposed=exposed, in_bucket=bool(seed % 2))
        self._steps = steps
        self._seed = seed
        self._exposed = exposed
        self._memory: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self._wrong: list[str] = []
        self._done = Counter[str]()
        self._over = threading.Event()

    def describe(self) -> str:
        """Return how often each fault and command was tried."""
        return ", ".join(f"{count} times {what}" for what, count in sorted(self._done.items())) or "nothing"

    def run(self) -> list[str]:
        """Run all steps, wait until the deployment has caught up, and return what is not as it must be."""
        with self._deployment as deployment:
            traffic = Traffic(deployment.api.url, deployment.landing, deployment.source, self._seed)
            threads = [threading.Thread(target=self._guard, args=(self._follow_plan,), daemon=True)]
            if self._exposed:
                threads.append(threading.Thread(target=self._guard, args=(self._run_commands,), daemon=True))
            for thread in threads:
                thread.start()
            self._act(traffic, threads[0])
            self._over.set()
            for thread in threads:
                thread.join()
            return [*self._wrong, *traffic.faults, *self._settle(traffic), *self._judge_memory()]

    def _guard(self, work: Any) -> None:
        try:
            work()
        except BaseException as error:
            self._wrong.append(f"the soak itself failed: {error!r}")
            raise

    def _act(self, traffic: Traffic, plan: threading.Thread) -> None:
        next_sample = 0.0
        while plan.is_alive():
            traffic.act()
            if (now := time.monotonic()) >= next_sample:
                next_sample = now + _SAMPLE_SECONDS
                self._sample()
                report(f"{traffic.describe()}, {sum(self._done.values())} faults and commands tried")
            time.sleep(_ACTION_SECONDS)

    def _follow_plan(self) -> None:
        begin = time.monotonic()
        for step in self._steps:
            time.sleep(max(0.0, begin + step.at - time.monotonic()))
            fault = FAULTS[step.fault]
            if self._exposed:
                report(f"{step.fault} ({step.choice})" + (f" for {step.seconds} s" if fault.end else ""))
            fault.begin(self._deployment, step.choice)
            self._done[step.fault] += 1
            if fault.end:
                time.sleep(step.seconds)
                fault.end(self._deployment, step.choice)

    def _run_commands(self) -> None:
        """Run one command after the other until the plan is over."""
        source = random.Random(self._seed)
        while not self._over.wait(source.uniform(2, 10)):
            arguments = source.choice(_COMMANDS)
            with self._deployment.command(*arguments) as process:
                try:
                    output, _ = process.communicate(timeout=_COMMAND_SECONDS)
                except subprocess.TimeoutExpired:
                    self._wrong.append(f"`fhir-assets {' '.join(arguments)}` runs for {_COMMAND_SECONDS:.0f} s")
                    continue
            self._wrong += judge_command(arguments, process.returncode, output)
            self._done[f"`{' '.join(arguments)}`"] += 1

    def _sample(self) -> None:
        for name, processes in self._deployment.find_processes():
            with suppress(psutil.NoSuchProcess):
                if processes and time.time() - processes[0].create_time() < _START_SECONDS:
                    continue  # It was killed, and has not imported what it needs: its memory says nothing yet.
                used = sum(process.memory_info().rss for process in processes)
                self._memory[name].append((time.monotonic(), used / 2**20))

    def _settle(self, traffic: Traffic) -> list[str]:
        """Wait until nothing waits any more, and return what is still wrong after that time."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        wrong = ["nothing was asked"]
        while wrong and time.monotonic() < deadline:
            report(f"waiting: {'; '.join(wrong)}")
            time.sleep(15)
            if not traffic.settle():
                wrong = ["posts are not answered"]
                continue
            try:
                # A window also has to reconcile, which it does not while its last post is loaded.
                wrong = self._find_wrong(traffic) or self._require("reconcile")
            except (DatabaseUnavailable, psycopg.OperationalError):  # It may just come back.
                wrong = ["the database does not answer"]
        return wrong or self._require("audit", "verify")

    def _find_wrong(self, traffic: Traffic) -> list[str]:
        with Warehouse(self._deployment.settings).connect() as conn:

            def ask(statement: str) -> list[tuple[Any, ...]]:
                return list(conn.execute(statement).fetchall())

            names = dict(ask("SELECT id, given FROM fhir.patient"))
            withheld = {key for (key,) in ask("SELECT id FROM ops.withheld WHERE resource_type = 'Patient'")}
            [(visits,)] = ask("SELECT count(*) FROM fhir.encounter")
            [(dead,)] = ask("SELECT count(*) FROM ops.dead_letters WHERE status <> 'resolved'")
            incidents = ask("SELECT kind, name FROM ops.incidents WHERE closed_at IS NULL")
        shared = {p.id: p for p in traffic.patients if p.shares}
        denied = {p.id for p in traffic.patients if not p.shares}
        outdated = [key for key, p in shared.items() if key in names and f"Version{p.version}" not in str(names[key])]
        facts = {
            "posted patients are not in the tables": len(shared.keys() - names.keys()),
            "posted patients have an earlier version in the tables": len(outdated),
            "patients who deny are in the tables": len(denied & names.keys()),
            "patients who deny are not counted as withheld": len(denied - withheld),
            "patients of the source are not in the tables": len(set(self._deployment.source.ids) - names.keys()),
            f"visits are missing (of {traffic.visits})": traffic.visits - visits,
            f"dead letters are missing (of {traffic.bad_rows} bad rows)": traffic.bad_rows - dead,
        }
        wrong = [f"{count} {fact}" for fact, count in facts.items() if count]
        # Files with bad rows stay an incident until somebody corrects or discards the rows.
        expected = {("check", "landing:files_are_whole")} if traffic.bad_rows else set()
        return wrong + [f"the incident {kind} {name} is open" for kind, name in sorted(set(incidents) - expected)]

    def _require(self, *arguments: str) -> list[str]:
        """Return what is wrong with a command that must succeed now."""
        with self._deployment.command(*arguments) as process:
            output, _ = process.communicate()
        code = process.returncode
        return [f"`fhir-assets {' '.join(arguments)}` ended with {code}: {output}"] if code else []

    def _judge_memory(self) -> list[str]:
        """Return the processes that use more memory in the last quarter than in the second one, or that had ended."""
        wrong = []
        for name, samples in sorted(self._memory.items()):
            begin, end = samples[0][0], samples[-1][0]
            quarters = defaultdict[int, list[float]](list)
            for at, size in samples:
                quarters[min(3, int(4 * (at - begin) / max(end - begin, 1)))].append(size)
            if 1 in quarters and 3 in quarters:
                before, after = statistics.median(quarters[1]), statistics.median(quarters[3])
                report(f"{name}: {before:.0f} MiB in the second quarter, {after:.0f} MiB in the last one")
                if not (before and after):
                    wrong.append(f"{name} had ended in half of the samples: nothing started it again")
                if after > before * _GROWTH + 50:
                    wrong.append(f"{name} grew from {before:.0f} to {after:.0f} MiB")
        return wrong


def report(message: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)
