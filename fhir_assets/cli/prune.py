"""`fhir-assets prune`: what has had its time."""

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
    older_than_days: Annotated[float, typer.Option(min=1, help="What is at least so old")] = 30,
    only: Annotated[str | None, typer.Option(help="Comma-separated: events, runs, ticks, dead-letters, …")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Take it away; without this it is only counted")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Count, or with --apply take away: Dagster's old events, runs and ticks, resolved dead letters, incidents that
    are over, and parts of the store that no partition names.
    """
    settings = load_settings()
    warehouse = Warehouse(settings)
    instance = config.open_instance(settings)
    before = datetime.now(UTC) - timedelta(days=older_than_days)
    with (
        warehouse.connect() as conn,
        connections.connect(os.environ["DAGSTER_POSTGRES_URL"]) as dagster_conn,
    ):
        there = list_prunable(conn, dagster_conn, instance, build_store(settings), before)
        wanted = only.split(",") if only else [kind.name for kind in there]
        if unknown := set(wanted) - {kind.name for kind in there}:
            raise ConfigurationError(
                f"--only: {', '.join(sorted(unknown))} is unknown; give some of "
                f"{', '.join(kind.name for kind in there)}"
            )
        rows: list[dict[str, object]] = []
        for kind in (kind for kind in there if kind.name in wanted):
            number, size = kind.count()
            conn.commit()
            dagster_conn.commit()
            gone = kind.remove() if apply and number else 0
            rows.append({"what": kind.name, "old": number, "bytes": size, "removed": gone, "that_is": kind.description})
    if json:
        print_json({"before": before, "applied": apply, "kinds": rows})
        return
    print_table(f"Older than {before:%Y-%m-%d %H:%M} UTC", rows, ("what", "old", "bytes", "removed", "that_is"))
    if not apply:
        console.print("Nothing was removed: --apply does it.")
