"""`fhir-assets prune`: count or remove old events, runs, dead letters, incidents and unused files."""

import os
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.orchestration.instance import config
from fhir_assets.orchestration.prune import list_prunable
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import connections


def prune(
    older_than_days: Annotated[float, typer.Option(min=1, help="Only data that is older than this many days")] = 30,
    only: Annotated[
        str | None, typer.Option(help="Only these kinds, comma-separated: events, runs, ticks, dead-letters, …")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Remove the data; without this option it is only counted")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Count old data, or remove it with --apply: Dagster's events, runs and ticks, resolved dead letters, ended
    incidents, and files of the store that no partition refers to.
    """
    settings = load_settings()
    warehouse = Warehouse(settings)
    instance = config.open_instance(settings)
    before = datetime.now(UTC) - timedelta(days=older_than_days)
    with (
        warehouse.connect() as conn,
        connections.connect(os.environ["DAGSTER_POSTGRES_URL"]) as dagster_conn,
    ):
        prunable = list_prunable(conn, dagster_conn, instance, build_store(settings), before)
        wanted = only.split(",") if only else [kind.name for kind in prunable]
        if unknown := set(wanted) - {kind.name for kind in prunable}:
            raise ConfigurationError(
                f"--only: {', '.join(sorted(unknown))} is unknown; known kinds are "
                f"{', '.join(kind.name for kind in prunable)}"
            )
        rows: list[dict[str, object]] = []
        for kind in (kind for kind in prunable if kind.name in wanted):
            count, size = kind.count()
            conn.commit()
            dagster_conn.commit()
            removed = kind.remove() if apply and count else 0
            rows.append(
                {"what": kind.name, "old": count, "bytes": size, "removed": removed, "that_is": kind.description}
            )
    if json:
        print_json({"before": before, "applied": apply, "kinds": rows})
        return
    table = [{**row, "kind": row["what"], "description": row["that_is"]} for row in rows]
    print_table(f"Older than {before:%Y-%m-%d %H:%M} UTC", table, ("kind", "old", "bytes", "removed", "description"))
    if not apply:
        console.print("Nothing was removed: run the command with --apply to remove the data.")
