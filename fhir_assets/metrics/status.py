"""The state of a deployment: its daemons, its last loads, the types that are behind, and its problems."""

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fhir_assets.metrics.pipeline import dagster_url
from fhir_assets.settings import Settings
from fhir_assets.warehouse.dagster.activity import Activity, read_activity
from fhir_assets.warehouse.ops import checkpoints, incidents, post_loader, received, run_history
from fhir_assets.warehouse.ops.incidents import Incident
from fhir_assets.warehouse.postgres.db import connections
from fhir_assets.warehouse.postgres.db.connections import OpenConnection

HEARTBEAT_MINUTES = 5
"""The age in minutes at which a daemon's heartbeat means that the daemon is not running, as in the Dagster UI."""

MIN_FREE_SHARE = 0.05
"""The share of a disk that must be free."""


@dataclass(frozen=True)
class Disk:
    """A disk that the deployment writes to: one of its folders, and its free and total bytes."""

    folder: str
    free: int
    total: int


@dataclass(frozen=True)
class Status:
    """The state of a deployment.

    ``problems`` has a message for each problem; the deployment is healthy if it is empty.
    """

    activity: Activity
    loads: list[dict[str, Any]]
    """For each resource type, its latest run, ``loaded_until``, and the number of windows that it is ``behind``."""
    waiting: int
    """The number of windows with received resources that are not in the tables."""
    post_loader: bool
    """Whether a post loader runs."""
    incidents: list[Incident]
    disks: list[Disk]
    problems: list[str]


def read_status(settings: Settings, connect: OpenConnection) -> Status:
    """Return the state of the deployment. ``connect`` opens its database. Raises DatabaseUnavailable."""
    now = datetime.now(UTC)
    with connections.connect(dagster_url(settings)) as conn:
        activity = read_activity(conn)
    with connect() as conn:
        known = checkpoints.get(conn, settings.fhir_resource_types)
        loads = {row["resource_type"]: row for row in run_history.find_last_loads(conn)}
        waiting = len(received.find_pending(conn))
        post_loader_runs = post_loader.is_running(conn)
        open_incidents = incidents.list_open(conn)
    disks = _read_disks(settings)
    types = [name for name in settings.fhir_resource_types if name in known or name in loads]
    return Status(
        activity,
        [
            {
                "type": name,
                "last_run": loads[name]["started_at"] if name in loads else None,
                "status": loads[name]["status"] if name in loads else None,
                "loaded": loads[name]["loaded"] if name in loads else None,
                "loaded_until": known[name].loaded_until if name in known else None,
                "behind": (
                    len(list(settings.window_scheme.between(min(known[name].loaded_until, now), now)))
                    if name in known
                    else None
                ),
            }
            for name in types
        ],
        waiting,
        post_loader_runs,
        open_incidents,
        disks,
        [*_find_problems(activity, now), *_describe_incidents(open_incidents), *_describe_disks(disks)],
    )


def _find_problems(activity: Activity, now: datetime) -> list[str]:
    if not activity.heartbeats:
        return ["No Dagster daemon has ever run: start `fhir-assets dev`, or the daemon of the deployment"]
    oldest = now - timedelta(minutes=HEARTBEAT_MINUTES)
    problems = []
    if max(activity.heartbeats.values()) < oldest:
        last = max(activity.heartbeats.values())
        problems.append(
            f"The Dagster daemon does not run: its last heartbeat was at {last:%Y-%m-%d %H:%M} UTC. Start it"
        )
    failed = [tick.name for tick in activity.ticks if tick.status == "FAILURE"]
    if failed:
        problems.append(f"The last tick failed: {', '.join(failed)}. The Dagster UI shows the reason on its page")
    return problems


def _describe_incidents(open_incidents: list[Incident]) -> list[str]:
    return [f"Since {item.opened_at:%Y-%m-%d %H:%M} UTC: {item.kind} {item.name} fails" for item in open_incidents]


def _describe_disks(disks: list[Disk]) -> list[str]:
    return [
        f"Less than {MIN_FREE_SHARE:.0%} of the disk of {disk.folder} is free: free space"
        for disk in disks
        if disk.free < disk.total * MIN_FREE_SHARE
    ]


def _read_disks(settings: Settings) -> list[Disk]:
    """Return the disks of the local folders of the deployment, each disk once."""
    named = [str(settings.home), settings.fhir_store_url, settings.fhir_landing_url, settings.fhir_export_url]
    disks: dict[int, Disk] = {}
    for folder in named:
        if folder and "://" not in folder and Path(folder).exists():
            usage = shutil.disk_usage(folder)
            disks.setdefault(Path(folder).stat().st_dev, Disk(folder, usage.free, usage.total))
    return list(disks.values())
