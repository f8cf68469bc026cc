"""Run a deployment under traffic, kills and outages, then ask whether anything was lost: ``make soak``.

``python -m fhir_assets_tests.support.soak [--minutes 60] [--seed N]`` starts `fhir-assets dev`, the API and a FHIR
server on free ports. Patients and visits are posted, files of visits land, patients deny and permit, and the server
gets resources; every half minute one process is killed, each in turn, and the server is down for a while. In the end
everything that was accepted must be in the tables, withheld, or a dead letter, once; no denied patient may ever have
been shown; no incident may stay open, every window reconciles, and no process may have grown. The seed repeats the
traffic, not the timing.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import psycopg

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.settings import load_settings
from fhir_assets_tests.support.api import TOKENS, Api, api_environment, api_process
from fhir_assets_tests.support.dev_processes import PARTS, find, find_url, is_up, running_dev, wait_until
from fhir_assets_tests.support.soak.source import Source
from fhir_assets_tests.support.soak.traffic import Traffic

_KILL_SECONDS = 30.0
_OUTAGE_SECONDS = 40.0
_SAMPLE_SECONDS = 30.0
_ACTION_SECONDS = 0.25
_SETTLE_SECONDS = 1200.0
_GROWTH = 1.25
"""How many times its memory of the second quarter a process may use in the last one, beside 50 MiB."""


class Soak:
    """A deployment with its traffic, in a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        (folder / "landing").mkdir()
        self._source = Source(folder / "source")
        self._values: dict[str, object] = {
            "fhir_assets_home": str(folder / "home"),
            "fhir_landing_url": str(folder / "landing"),
            "fhir_base_url": self._source.url,
            "fhir_resource_types": "Patient,Encounter,Consent",
            "fhir_last_updated_gte": "2024-01-01",
            "fhir_partition": "monthly",
            "fhir_schedule": "* * * * *",
            "checks_minutes": 1,
            "consent_policy": "opt-out",
            "api_tokens": TOKENS,
            "api_rate_limit": 100_000,
            "metrics_port": 0,
        }
        self._settings = load_settings(**{name: str(value) for name, value in self._values.items()})
        self._memory: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self._victims = cycle([*PARTS, "The API", "The source"])
        self._seed = seed
        self.kills = 0

    def run(self, minutes: float) -> list[str]:
        """Run for so long, wait until the deployment has caught up, and return what is not as it must be."""
        environment = {name.upper(): str(value) for name, value in self._values.items()}
        self._source.start()
        with ExitStack() as stack:
            stack.callback(self._source.kill)
            self._process, text = stack.enter_context(running_dev(self._folder, **environment))
            url = find_url(text)
            wait_until(lambda: is_up(url), "`fhir-assets dev` does not start")
            api = self._start_api(stack)
            traffic = Traffic(api.url, self._folder / "landing", self._source, self._seed)
            self._soak(traffic, stack, api, time.monotonic() + minutes * 60)
            return [*traffic.faults, *self._settle(traffic), *self._judge_memory()]

    def _start_api(self, stack: ExitStack, port: int | None = None) -> Api:
        return stack.enter_context(api_process(self._values, self._folder, workers=2, port=port))

    def _restart_api(self, stack: ExitStack, api: Api) -> Api:
        """Kill the API, whose workers must end by themselves, and start it again on its port."""
        assert api.process is not None
        workers = psutil.Process(api.process.pid).children()
        api.process.kill()
        psutil.wait_procs(workers, timeout=60)
        return self._start_api(stack, int(api.url.rsplit(":", 1)[1]))

    def _soak(self, traffic: Traffic, stack: ExitStack, api: Api, deadline: float) -> None:
        next_kill = time.monotonic() + _KILL_SECONDS
        next_sample = back_at = 0.0
        while (now := time.monotonic()) < deadline:
            traffic.act()
            if now >= next_sample:
                next_sample = now + _SAMPLE_SECONDS
                self._sample(api)
                _report(f"{(deadline - now) / 60:.0f} min left, {traffic.describe()}, {self.kills} kills")
            if now >= next_kill:
                next_kill = now + _KILL_SECONDS
                self.kills += 1
                match next(self._victims):
                    case "The API":
                        api = self._restart_api(stack, api)
                    case "The source":
                        self._source.kill()
                        back_at = now + _OUTAGE_SECONDS
                    case part:
                        self._kill_part(part)
            if back_at and now >= back_at:
                self._source.start()
                back_at = 0.0
            time.sleep(_ACTION_SECONDS)
        if back_at:
            self._source.start()

    def _kill_part(self, part: str) -> None:
        dev = psutil.Process(self._process.pid)
        victim = find(dev, self._folder / "home", PARTS[part])
        if victim is not None:
            with suppress(psutil.NoSuchProcess):
                victim.kill()

    def _sample(self, api: Api) -> None:
        dev = psutil.Process(self._process.pid)
        processes = {part: find(dev, self._folder / "home", pattern) for part, pattern in PARTS.items()}
        processes["The API"] = psutil.Process(api.process.pid) if api.process else None
        for name, process in processes.items():
            with suppress(psutil.NoSuchProcess):
                if process is not None and name != "The embedded Postgres":
                    tree = [process, *(process.children() if name == "The API" else ())]
                    used = sum(member.memory_info().rss for member in tree)
                    self._memory[name].append((time.monotonic(), used / 2**20))

    def _settle(self, traffic: Traffic) -> list[str]:
        """Wait until nothing waits any more, and return what is still wrong after that time."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        wrong = ["nothing was asked"]
        while wrong and time.monotonic() < deadline:
            _report(f"waiting: {'; '.join(wrong)}")
            time.sleep(15)
            if not traffic.settle():
                wrong = ["posts are not answered"]
                continue
            try:
                wrong = self._find_wrong(traffic)
            except (DatabaseUnavailable, psycopg.OperationalError):  # It may just come back.
                wrong = ["the database does not answer"]
        if not wrong:
            wrong = self._reconcile()
        return wrong

    def _find_wrong(self, traffic: Traffic) -> list[str]:
        with Warehouse(self._settings).connect() as conn:

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
            "patients of the source are not in the tables": len(set(self._source.ids) - names.keys()),
            f"visits are missing (of {traffic.visits})": traffic.visits - visits,
            f"dead letters are missing (of {traffic.bad_rows} bad rows)": traffic.bad_rows - dead,
        }
        wrong = [f"{count} {fact}" for fact, count in facts.items() if count]
        # Files with bad rows stay an incident until somebody corrects or discards the rows.
        expected = {("check", "landing:files_are_whole")} if traffic.bad_rows else set()
        return wrong + [f"the incident {kind} {name} is open" for kind, name in sorted(set(incidents) - expected)]

    def _reconcile(self) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", "from fhir_assets.cli import main; main()", "reconcile"],
            env=api_environment(self._values),
            capture_output=True,
            text=True,
            check=False,
        )
        return [f"`fhir-assets reconcile` ended with {done.returncode}: {done.stdout}"] if done.returncode else []

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
                _report(f"{name}: {before:.0f} MiB in the second quarter, {after:.0f} MiB in the last one")
                if not (before and after):
                    wrong.append(f"{name} had ended in half of the samples: nothing started it again")
                if after > before * _GROWTH + 50:
                    wrong.append(f"{name} grew from {before:.0f} to {after:.0f} MiB")
        return wrong


def _report(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def main() -> int:
    """Run the soak of the command line. Return 1 if anything was not as it must be, and keep its folder."""
    parser = argparse.ArgumentParser(prog="python -m fhir_assets_tests.support.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that it stops its processes.
    folder = Path(tempfile.mkdtemp(prefix="fhir_assets_soak_"))
    folder.chmod(0o711)
    _report(f"seed {arguments.seed}, {arguments.minutes:g} minutes, in {folder}")
    soak = Soak(folder, arguments.seed)
    wrong = soak.run(arguments.minutes)
    for fault in wrong:
        _report(fault)
    _report(f"{len(wrong)} faults after {soak.kills} kills" + (f": see the logs in {folder}" if wrong else ""))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
