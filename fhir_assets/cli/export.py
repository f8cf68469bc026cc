"""`fhir-assets export`: resources, dead letters and tables as files."""

import getpass
from datetime import UTC, datetime
from typing import Annotated

import typer

from fhir_assets.catalog import BY_NAME
from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.store import build_blobs, build_store
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.exports.export import Export, ExportedFile, Format, build_run_folder, find_run_windows
from fhir_assets.warehouse.postgres.tables import view_tables


def export(
    resource_type: Annotated[str, typer.Argument(metavar="TYPE|all", help="A resource type, or all of them")],
    output: Annotated[str, typer.Option("--output", "-o", help="A folder or s3://bucket/prefix")],
    first: Annotated[datetime | None, typer.Option("--from", help="The windows from this date on, UTC")] = None,
    last: Annotated[datetime | None, typer.Option("--to", help="… up to this date, UTC")] = None,
    run: Annotated[str | None, typer.Option("--run", help="The windows that a run worked on")] = None,
    form: Annotated[Format, typer.Option("--format", help="Of the tables: ndjson, parquet or csv")] = "parquet",
    raw: Annotated[bool, typer.Option("--raw", help="Resources as received")] = False,
    valid: Annotated[bool, typer.Option("--valid", help="Valid resources as received")] = False,
    normalized: Annotated[bool, typer.Option("--normalized", help="The tables of the views")] = False,
    letters: Annotated[bool, typer.Option("--dead-letters", help="What could not go on, with the reasons")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the files as JSON")] = False,
) -> None:
    """Write files: valid resources and tables, unless it is said what. The export of a run has a folder of its own."""
    settings = load_settings()
    types = _types(settings, resource_type)
    if run and (first or last):
        raise ConfigurationError("--run names its windows itself: leave --from and --to out")
    if not (raw or valid or normalized or letters):
        valid = normalized = True
    views = build_views(settings).views
    warehouse = Warehouse(settings)
    store = build_store(settings)
    target = build_blobs(settings, output)
    found: list[ExportedFile] = []
    with warehouse.connect() as conn:
        by_type: dict[str, list[str]] = {}
        folder, run_id, keys = "", None, _windows(settings, first, last)
        if run:
            try:
                run_id, by_type = find_run_windows(conn, run)
            except KeyError:
                raise ConfigurationError(
                    f"no run, or more than one, begins with {run}: `fhir-assets runs list` shows those there are"
                ) from None
            folder = build_run_folder(run_id, datetime.now(UTC))
            types = [name for name in types if name in by_type]
        view_tables.ensure_tables(conn, views)
        conn.commit()
        actor = f"cli:{getpass.getuser()}"
        writer = Export(
            conn, store, target, folder, run_id=run_id, actor=actor, withholding=build_consent_gate(settings).closed
        )
        for name in types:
            of_type = writer.for_type(name, by_type[name] if run else keys)
            if raw:
                found.append(of_type.raw())
            if valid:
                found.append(of_type.valid())
            if letters:
                found.append(of_type.dead_letters())
            if normalized:
                found.extend(of_type.table(view, form) for view in views if view.resource_type == name)
        place = writer.finish()
    if json:
        print_json({"folder": place, "files": found})
        return
    print_table("Exported", [_row(file) for file in found if file.rows], ("file", "rows", "bytes"))
    console.print(f"{len(found)} files in {place}, listed with their hashes in manifest.json", markup=False)


def _types(settings: Settings, wanted: str) -> list[str]:
    if wanted == "all":
        return list(settings.fhir_resource_types)
    if wanted not in BY_NAME:
        raise ConfigurationError(
            f"{wanted} is no resource type of the catalog: give one of {', '.join(BY_NAME)}, or all"
        )
    return [wanted]


def _windows(settings: Settings, first: datetime | None, last: datetime | None) -> list[str] | None:
    if first is None and last is None:
        return None
    scheme = settings.window_scheme
    begin = first.replace(tzinfo=UTC) if first else scheme.start
    end = last.replace(tzinfo=UTC) if last else datetime.now(UTC)
    if end < begin:
        raise ConfigurationError("--to lies before --from: nothing is exported")
    return [window.key for window in scheme.between(begin, end)]


def _row(file: ExportedFile) -> dict[str, object]:
    return {"file": file.name, "rows": file.rows, "bytes": file.bytes}
