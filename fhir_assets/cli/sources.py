"""`fhir-assets sources`: the settings that the loaded data belongs to, and what to do when they change."""

from typing import Annotated

import typer

from fhir_assets.accounts import find_account
from fhir_assets.cli.load_reports import report_failures
from fhir_assets.cli.output import console, hide_library_output, print_json, print_table
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.source import open_files
from fhir_assets.deployment.sources import build_binding
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.ingestion.outcome import select_failed
from fhir_assets.ingestion.runs import Ingestion
from fhir_assets.orchestration.instance import config
from fhir_assets.pipeline.sources.binding import REMEDY
from fhir_assets.pipeline.sources.transition import SourceTransition, TransitionResult
from fhir_assets.settings import Settings, SourceKind, load_settings
from fhir_assets.warehouse.ops import sources

app = typer.Typer(
    help="List the settings that the loaded data belongs to, and carry it over to other settings or start over.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@app.command("list")
def list_sources(json: Json = False) -> None:
    """List each setting that the state of a source belongs to, with its value at the first load and its value now."""
    settings = load_settings()
    warehouse = Warehouse(settings)
    binding = build_binding(settings, warehouse)
    with warehouse.connect() as conn:
        bound = sources.read_settings(conn, binding.source) or {}
        changes, problems = binding.find_changes(conn)
    changed = {change.setting.name for change in changes}
    rows = [
        {
            "source": binding.source,
            "setting": item.name,
            "loaded_with": bound.get(item.name),
            "now": item.value,
            "changed": item.name in changed,
        }
        for item in binding.settings
    ]
    if json:
        print_json({"settings": rows, "problems": problems})
        return
    print_table("Sources", rows, ("source", "setting", "loaded_with", "now", "changed"))
    for problem in problems:
        console.print(problem, markup=False, soft_wrap=True)
    if changed or problems:
        console.print(f"Loads are refused: {REMEDY}.", markup=False, soft_wrap=True)


@app.command("files")
def list_files(
    label: Annotated[str, typer.Option(help="Only labels that begin so, as dead letters and messages have them")] = "",
    json: Json = False,
) -> None:
    """List the files of FHIR_SOURCE=ndjson, with the label that stands for each in dead letters and messages.

    Without encryption keys the label is the name.
    """
    settings = load_settings()
    if settings.fhir_source is not SourceKind.NDJSON:
        raise ConfigurationError("the source is a server, not files: set FHIR_SOURCE=ndjson and FHIR_BASE_URL")
    found = open_files(settings, Warehouse(settings)).list_files()
    rows = [{"name": name, "label": shown} for name, shown in found if shown.startswith(label)]
    if json:
        print_json(rows)
    else:
        print_table("Files", rows, ("name", "label"))


@app.command("carry-over")
def carry_over(json: Json = False) -> None:
    """Keep the loaded data and continue with the current settings.

    Use it if the server has a new address but the same data, if the length or the start of the windows was changed, or
    if the store or the database was moved. State that is not valid under the current settings is computed or fetched
    again.
    """
    settings = load_settings()
    _finish(settings, _build_transition(settings).carry_over(), json)


@app.command("start-anew")
def start_anew(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    json: Json = False,
) -> None:
    """Remove everything that was loaded from the source; the next load fetches all of it from the current one.

    Resources of other channels (landing zone, HTTP API, CSV visits) stay in the store and are loaded again immediately.
    """
    settings = load_settings()
    if not yes:
        typer.confirm("Remove all resources of the source from the tables, with its checkpoints?", abort=True)
    _finish(settings, _build_transition(settings).start_anew(), json)


def _build_transition(settings: Settings) -> SourceTransition:
    warehouse = Warehouse(settings)
    store = build_store(settings)
    binding = build_binding(settings, warehouse, store)
    return SourceTransition(binding, warehouse.connect, store, actor=f"cli:{find_account()}")


def _finish(settings: Settings, result: TransitionResult, json: bool) -> None:
    """Load the received resources that have to be loaded again, and print a summary."""
    outcomes = []
    if result.received:
        ingestion = Ingestion(settings, build_definitions(settings), config.open_instance(settings))
        with hide_library_output():
            outcomes = [ingestion.load_received(windows, triggered_by="cli") for windows in ingestion.find_received()]
    failures = select_failed(outcomes)
    facts = {
        "changes": list(result.changes),
        "partitions_set_aside": result.set_aside,
        "resources_removed": result.removed,
        "received_windows_to_load": result.received,
        "runs": [outcome.run_id for outcome in outcomes],
        "success": not failures,
    }
    if json:
        print_json(facts)
    else:
        for change in result.changes or ("No setting has changed",):
            console.print(f"{change}.", markup=False, soft_wrap=True)
        console.print(
            f"{result.set_aside} partitions were set aside, {result.removed} resources removed from the tables, and "
            f"{result.received} windows with resources of other channels loaded again.",
            soft_wrap=True,
        )
        console.print("The next load (`fhir-assets ingest`, or the schedule) fetches what is missing.", soft_wrap=True)
    report_failures(settings, failures)
    if failures:
        raise typer.Exit(1)
