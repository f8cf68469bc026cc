"""`fhir-assets export`: write resources, dead letters and tables to files."""

from collections.abc import Mapping, Sequence
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
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.exports.export import Export, ExportedFile, Format, build_run_folder, find_run_windows
from fhir_assets.warehouse.ops import runs, window_verdicts
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.tables import view_tables


def export(
    resource_type: Annotated[
        str, typer.Argument(metavar="TYPE|all", help="A resource type, or all for every loaded type")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="A folder or s3://bucket/prefix to write to")],
    first: Annotated[datetime | None, typer.Option("--from", help="Export the windows from this date (UTC)")] = None,
    last: Annotated[datetime | None, typer.Option("--to", help="Export the windows up to this date (UTC)")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Export the windows of this run")] = None,
    form: Annotated[
        Format, typer.Option("--format", help="Format of the tables: ndjson, parquet, csv or xlsx")
    ] = "parquet",
    excel: Annotated[
        bool,
        typer.Option("--excel", help="With --format csv: a byte order mark, and codes that Excel keeps as text"),
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Export all resources as received")] = False,
    valid: Annotated[bool, typer.Option("--valid", help="Export valid resources as received")] = False,
    normalized: Annotated[bool, typer.Option("--normalized", help="Export the tables of the views")] = False,
    failed: Annotated[bool, typer.Option("--dead-letters", help="Export the dead letters with their reasons")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the files as JSON")] = False,
) -> None:
    """Write resources and tables to files: by default the valid resources and the tables.

    With --run the files are written to a folder for that run. The exit code is 1 if a table is left out because its
    ViewDefinition is not valid. Windows that do not reconcile are exported as they are; the command and the manifest
    list them.
    """
    settings = load_settings()
    _check_options(resource_type, form, excel=excel, run=run, dated=bool(first or last))
    if not (raw or valid or normalized or failed):
        valid = normalized = True
    view_set = build_views(settings)
    views = view_set.views
    broken = view_set.broken if normalized else ()
    warehouse = Warehouse(settings)
    store = build_store(settings)
    target = build_blobs(settings, output)
    files: list[ExportedFile] = []
    with warehouse.connect() as conn:
        keys_by_type: dict[str, list[str]] = {}
        folder, run_id, keys = "", None, _windows(settings, first, last)
        if run:
            run_id, keys_by_type = _find_run_windows(conn, run)
            folder = build_run_folder(run_id, datetime.now(UTC))
        actor = f"cli:{find_account()}"
        consent_gate = build_consent_gate(settings)
        ConsentStep(warehouse.connect, views, consent_gate, run_id="cli", actor=actor).run(datetime.now(UTC))
        types = _find_types(conn, settings, resource_type, keys_by_type if run else None)
        view_tables.ensure_tables(conn, views)
        conn.commit()
        withholding = consent_gate.withholds
        with Export(conn, store, target, folder, run_id=run_id, actor=actor, withholding=withholding) as writer:
            for name in types:
                type_export = writer.for_type(name, keys_by_type[name] if run else keys)
                if raw:
                    files.append(type_export.write_raw())
                if valid:
                    files.append(type_export.write_valid())
                if failed:
                    files.append(type_export.write_dead_letters())
                if normalized:
                    files.extend(
                        type_export.write_table(view, form, excel=excel) for view in views if view.resource_type == name
                    )
            unreconciled = {
                name: window_verdicts.find_faults(conn, name, keys_by_type[name] if run else keys) for name in types
            }
            written_folder = writer.finish(unreconciled=unreconciled)
    if json:
        print_json({"folder": written_folder, "files": files, "unreconciled": unreconciled})
    else:
        print_table("Exported", [_row(file) for file in files if file.rows], ("file", "rows", "bytes"))
        console.print(
            f"{len(files)} files in {written_folder}, listed in manifest.json with their hashes", markup=False
        )
    report_unreconciled_windows(
        [
            {"type": name, "window": window, "faults": [reason]}
            for name, windows in unreconciled.items()
            for window, reason in windows.items()
        ]
    )
    report_broken_views(broken)
    if broken:
        raise typer.Exit(1)


def _check_options(resource_type: str, form: Format, *, excel: bool, run: str | None, dated: bool) -> None:
    """Raise ConfigurationError for an unknown type, or for options that contradict each other."""
    if resource_type not in ("all", *BY_NAME):
        raise ConfigurationError(
            f"{resource_type} is not a supported resource type: pass one of {', '.join(BY_NAME)}, or all"
        )
    if excel and form != "csv":
        raise ConfigurationError("--excel requires --format csv")
    if run and dated:
        raise ConfigurationError("--run selects the windows of the run: leave out --from and --to")


def _find_run_windows(conn: Connection, run: str) -> tuple[str, dict[str, list[str]]]:
    """Return the complete id of a run and its windows by type. Raises ConfigurationError if there is no such run."""
    try:
        return find_run_windows(conn, run)
    except KeyError:
        raise ConfigurationError(
            f"there is not exactly one run whose id begins with {run}: `fhir-assets runs list` prints the ids"
        ) from None


def _find_types(
    conn: Connection, settings: Settings, wanted: str, keys_by_type: Mapping[str, Sequence[str]] | None
) -> list[str]:
    """Return the types to export. ``keys_by_type`` are the windows of the selected run, None without one.

    Types that were loaded and are no longer in FHIR_RESOURCE_TYPES are included. Raises ConfigurationError if the run
    has not loaded the wanted type.
    """
    if keys_by_type is None:
        loaded = {*settings.fhir_resource_types, *runs.find_types(conn)} if wanted == "all" else {wanted}
    else:
        loaded = set(keys_by_type) if wanted == "all" else {wanted}.intersection(keys_by_type)
    if types := [name for name in BY_NAME if name in loaded]:
        return types
    raise ConfigurationError(f"the run did not load {wanted}: `fhir-assets runs show ID` prints what it loaded")


def _windows(settings: Settings, first: datetime | None, last: datetime | None) -> list[str] | None:
    if first is None and last is None:
        return None
    scheme = settings.window_scheme
    begin = first.replace(tzinfo=UTC) if first else scheme.start
    end = last.replace(tzinfo=UTC) if last else datetime.now(UTC)
    if end < begin:
        raise ConfigurationError("--to is before --from: pass a later --to")
    return [window.key for window in scheme.between(begin, end)]


def _row(file: ExportedFile) -> dict[str, object]:
    return {"file": file.name, "rows": file.rows, "bytes": file.bytes}
