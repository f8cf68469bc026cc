"""`fhir-assets status`: the state of the deployment in one screen."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from fhir_assets.cli.output import console, errors, print_json, print_table
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.metrics.status import Status, read_status
from fhir_assets.settings import load_settings


def status(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Print the state of the daemons, the last ticks, the last load of each type, types that are behind, open incidents
    and free disk space.

    The exit code is 1 if there is a problem, which is printed on stderr.
    """
    settings = load_settings()
    state = read_status(settings, Warehouse(settings).connect_read_only)
    if json:
        print_json(asdict(state))
    else:
        _print(state)
    for problem in state.problems:
        errors.print(problem, markup=False, soft_wrap=True)
    if state.problems:
        raise typer.Exit(1)


def _print(state: Status) -> None:
    now = datetime.now(UTC)
    heartbeats = state.activity.heartbeats
    print_table(
        "Daemons",
        [{"daemon": name, "heartbeat": f"{(now - at).total_seconds():,.0f} s ago"} for name, at in heartbeats.items()],
        ("daemon", "heartbeat"),
    )
    print_table("Last ticks", [asdict(tick) for tick in state.activity.ticks], ("name", "status", "at"))
    print_table("Loads", state.loads, ("type", "last_run", "status", "loaded", "loaded_until", "behind"))
    runs = ", ".join(f"{count:,} {name.lower()}" for name, count in state.activity.unfinished_runs.items())
    console.print(f"Runs: {runs or 'none is queued or running'}")
    console.print(f"Windows with received resources that are not loaded yet: {state.waiting:,}")
    console.print(f"Post loader: {'runs' if state.post_loader else 'does not run: Dagster loads posts'}")
    console.print(f"Open incidents: {len(state.incidents):,}")
    for disk in state.disks:
        console.print(
            f"Disk of {disk.folder}: {disk.free / 2**30:,.1f} GiB of {disk.total / 2**30:,.1f} free", markup=False
        )
