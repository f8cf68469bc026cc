"""Run a deployment under traffic and faults, then ask whether anything was lost: ``make soak``, ``make chaos``.

``python -m fhir_assets_tests.support.soak [--minutes 60] [--seed N] [--chaos]`` starts `fhir-assets dev`, the API and
a FHIR server on free ports. Patients and visits are posted, files of visits land, patients deny and permit, and the
server gets resources. A plan, drawn from the seed, kills processes and takes the server down; with ``--chaos`` it also
pauses processes, sets their clock, cuts and delays the network, fills the disk, fails over to a replica of Postgres and
lets the server misbehave, while commands run; with an odd seed the store is in a bucket.

In the end everything that was accepted must be in the tables, withheld, or a dead letter, once; no denied patient may
ever have been shown; no incident may stay open, every window reconciles, the audit log is whole, and no process may
have grown.

The seed repeats the plan and the traffic, not the timing. The plan is kept in the folder of the run; ``--plan`` runs
such a file, or some of its lines, and ``--shrink`` looks for the fewest steps that still fail.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fhir_assets_tests.support.soak import plan
from fhir_assets_tests.support.soak.faults import FAULTS, KILLS
from fhir_assets_tests.support.soak.run import Soak, report

_PAUSE_SECONDS = (4.0, 18.0)
_LONGEST_SECONDS = (6.0, 25.0)
"""The least and the most of the pause between two faults, and of their time: a short plan has short faults."""


def main() -> int:
    """Run what the command line says. Return 1 if anything was not as it must be, and keep the folder."""
    parser = argparse.ArgumentParser(prog="python -m fhir_assets_tests.support.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--chaos", action="store_true", help="all faults, not only kills and outages")
    parser.add_argument("--plan", type=Path, help="a plan that a run has kept")
    parser.add_argument("--shrink", action="store_true", help="after a failure, look for the fewest steps that fail")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that it stops its processes.
    faults = FAULTS if arguments.chaos else KILLS
    seconds = arguments.minutes * 60
    pause, longest = _limit(seconds / 24, _PAUSE_SECONDS), _limit(seconds / 18, _LONGEST_SECONDS)
    steps = (
        plan.read(arguments.plan)
        if arguments.plan
        else plan.draw(arguments.seed, seconds, faults, pause=pause, longest=longest)
    )

    def fails(tried: Sequence[plan.Step]) -> bool:
        return bool(_run(tried, arguments.seed, exposed=arguments.chaos))

    failed = bool(_run(steps, arguments.seed, exposed=arguments.chaos))
    if failed and arguments.shrink:
        fewest = plan.shrink(steps, fails)
        report("the fewest steps that fail: " + "; ".join(map(str, fewest)))
    return int(failed)


def _limit(value: float, limits: tuple[float, float]) -> float:
    least, most = limits
    return min(max(value, least), most)


def _run(steps: Sequence[plan.Step], seed: int, *, exposed: bool) -> list[str]:
    folder = Path(tempfile.mkdtemp(prefix="fhir_assets_soak_"))
    folder.chmod(0o711)
    plan.save(steps, folder / "plan.jsonl")
    report(f"seed {seed}, {len(steps)} steps, in {folder}")
    soak = Soak(folder, seed, steps, exposed=exposed)
    wrong = soak.run()
    for fault in wrong:
        report(fault)
    report(f"{len(wrong)} faults after {soak.describe()}" + (f": see the logs in {folder}" if wrong else ""))
    return wrong


if __name__ == "__main__":
    sys.exit(main())
