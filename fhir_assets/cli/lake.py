"""`fhir-assets lake`: write the tables as Parquet files to FHIR_LAKE_URL."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import typer

from fhir_assets.accounts import find_account
from fhir_assets.catalog import BY_NAME
from fhir_assets.cli.load_reports import report_broken_views, report_unreconciled_windows
from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.store import build_blobs, build_store
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.pipeline.lake.step import LakeStep
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.ops import runs


def lake(
    types: Annotated[
        str | None,
        typer.Option(help="Comma-separated resource types; default: FHIR_RESOURCE_TYPES and all loaded types"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON")] = False,
) -> None:
    """Write the tables as Parquet files to FHIR_LAKE_URL. Only windows whose rows changed are written.

    Windows that do not reconcile are held back and listed; the next update after they reconcile writes them. The exit
    code is 1 if windows are held back, or if a table is left out because its ViewDefinition is not valid.
    """
    settings = load_settings()
    if not settings.fhir_lake_url:
        raise ConfigurationError("FHIR_LAKE_URL is not set: set it to a folder or to s3://bucket/prefix")
    update = write_lake(settings, types.split(",") if types else None, actor=f"cli:{find_account()}")
    broken = build_views(settings).broken
    if json:
        print_json({"lake": settings.fhir_lake_url, "tables": update.rows, "held_back": update.held})
    else:
        report_lake(settings, update)
    report_unreconciled_windows(update.held)
    report_broken_views(broken)
    if update.held or broken:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class LakeReport:
    """What an update of the lake did: ``rows`` by table, and the windows that it held back, with the reasons."""

    rows: Sequence[dict[str, object]]
    held: Sequence[dict[str, object]]


def write_lake(settings: Settings, types: Sequence[str] | None, *, actor: str) -> LakeReport:
    """Update the lake for the tables of ``types``, by default all. Raises ConfigurationError for an unknown type."""
    if unknown := [name for name in types or () if name not in BY_NAME]:
        raise ConfigurationError(f"{unknown[0]} is not a supported resource type: pass some of {', '.join(BY_NAME)}")
    views = build_views(settings).views
    warehouse = Warehouse(settings)
    with warehouse.connect() as conn:
        wanted = set(types) if types is not None else {*settings.fhir_resource_types, *runs.find_types(conn)}
    ConsentStep(warehouse.connect, views, build_consent_gate(settings), run_id="cli", actor=actor).run(
        datetime.now(UTC)
    )
    step = LakeStep(
        warehouse.connect,
        build_store(settings),
        build_blobs(settings, settings.fhir_lake_url),
        views,
        run_id="cli",
        actor=actor,
    )
    rows: list[dict[str, object]] = []
    held: dict[tuple[str, str], str] = {}
    for name in (name for name in BY_NAME if name in wanted):
        for view, update in step.run(name, [view for view in views if view.resource_type == name]):
            rows.append(
                {
                    "table": view.name,
                    "windows_written": update.windows,
                    "windows_removed": update.removed,
                    "rows": update.rows,
                    "bytes": update.bytes,
                }
            )
            held.update({(name, window): reason for window, reason in update.held.items()})
    return LakeReport(
        rows, [{"type": name, "window": window, "faults": [reason]} for (name, window), reason in sorted(held.items())]
    )


def report_lake(settings: Settings, report: LakeReport) -> None:
    """Print the tables that were written, and one sentence about all of them."""
    changed = [row for row in report.rows if row["windows_written"] or row["windows_removed"]]
    if changed:
        print_table("Lake", changed, ("table", "windows_written", "windows_removed", "rows", "bytes"))
    console.print(
        f"The lake at {settings.fhir_lake_url} has {len(report.rows)} tables, of which {len(changed)} changed.",
        markup=False,
        soft_wrap=True,
    )
