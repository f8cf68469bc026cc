"""`fhir-assets demo`: run the pipeline on a synthetic population, then serve the Dagster UI."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fhir_assets.atomic_files import replace_content
from fhir_assets.cli.dev import serve_ui
from fhir_assets.cli.ingest import load_due
from fhir_assets.cli.load_reports import print_summary, report_failures, summarize_runs
from fhir_assets.cli.output import console, hide_library_output, print_table, warn_of_clear_data
from fhir_assets.deployment.sources import build_binding, describe_server
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.ingestion.outcome import select_failed
from fhir_assets.ingestion.runs import open_ingestion
from fhir_assets.pipeline.sources.transition import SourceTransition
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.queries import totals

PATIENTS = 150
DAYS = 30
BAD_SHARE = 0.02
SEED = 1


class PopulationRange(msgspec.Struct):
    """The time range of the generated population. It is stored, so that the next demo loads the same windows."""

    start: datetime
    end: datetime


def demo(
    ui: Annotated[bool, typer.Option(help="Serve the Dagster UI after the load")] = True,
    patients: Annotated[int, typer.Option(min=1, help="Number of synthetic patients")] = PATIENTS,
    port: Annotated[
        int | None, typer.Option(envvar="DAGSTER_PORT", help="Port of the UI; if it is taken, a free port is used")
    ] = None,
) -> None:
    """Load a synthetic population from a sandbox FHIR server, then serve the Dagster UI.

    About 2 % of the resources have deliberate defects. All state is in FHIR_ASSETS_HOME (default: .fhir_assets/), and a
    second demo continues with it.
    """
    settings = load_settings()
    if not settings.encrypts:
        warn_of_clear_data()
    home = settings.home
    folder = home / "sandbox"
    population = _ensure_population(folder, patients)
    started = settings.db_url is None and not embedded.is_running(home)
    try:
        with SandboxProcess(folder / "population") as sandbox, _sandbox_environment(sandbox.url, population):
            _load(folder / "addresses")
            if ui:
                serve_ui(load_settings(), port)
    finally:
        if started:
            embedded.stop(home)


def _ensure_population(folder: Path, patients: int) -> PopulationRange:
    """Return the range of the population of an earlier demo, or generate a population that ends yesterday."""
    range_file = folder / "windows.json"
    if range_file.exists():
        return msgspec.json.decode(range_file.read_bytes(), type=PopulationRange)
    console.print(f"Generating {patients} synthetic patients …")
    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    new_range = PopulationRange(end - timedelta(days=DAYS), end)
    try:
        population = Population(patients, SEED, BAD_SHARE, end=new_range.end, start=new_range.start)
        write_population(folder / "population", population)
        replace_content(range_file, msgspec.json.encode(new_range))
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {folder}: {error.strerror}. Set FHIR_ASSETS_HOME to a writable folder with free space"
        ) from None
    return new_range


@contextmanager
def _sandbox_environment(url: str, population: PopulationRange) -> Iterator[None]:
    """Set the environment of this process and of its child processes: the sandbox server and the windows to load."""
    variables = {
        "FHIR_BASE_URL": url,
        "FHIR_SOURCE": "search",
        "FHIR_LAST_UPDATED_GTE": population.start.isoformat(),
        "FHIR_PARTITION": "daily",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _carry_over_to_sandbox(settings: Settings, addresses: Path) -> None:
    """Carry the state of an earlier demo over to the new address of its sandbox server, which has the same data.

    ``addresses`` is a file with the addresses of all demos. State that was loaded from another server is not changed;
    the load is then refused.
    """
    warehouse = Warehouse(settings)
    binding = build_binding(settings, warehouse)
    earlier = addresses.read_text().splitlines() if addresses.exists() else []
    addresses_now = [*earlier, describe_server(settings.fhir_base_url)]
    replace_content(addresses, "".join(f"{address}\n" for address in addresses_now).encode())
    with warehouse.connect() as conn:
        changes, problems = binding.find_changes(conn)
    moved = [change for change in changes if change.setting.name == "FHIR_BASE_URL" and change.bound in earlier]
    if moved and moved == changes and not problems:
        SourceTransition(binding, warehouse.connect, binding.store, actor="demo").carry_over()


def _load(addresses: Path) -> None:
    settings = load_settings()
    console.print(f"Sandbox FHIR server: {settings.fhir_base_url}")
    Warehouse(settings).migrate()
    _carry_over_to_sandbox(settings, addresses)
    outcomes = load_due(settings, triggered_by="demo")
    with Warehouse(settings).connect() as conn:
        stored = totals.count_by_type(conn)
    if loaded := summarize_runs(settings, outcomes):
        print_summary("Loaded now", loaded)
        _check_tables(settings)
    else:
        print_table("Loaded earlier", stored, ("type", "loaded", "dead", "withheld"))
    failures = select_failed(outcomes)
    report_failures(settings, failures)
    if failures:
        raise typer.Exit(1)
    console.print("Tables: fhir-assets psql (schema fhir)", markup=False)
    console.print("Dead letters: fhir-assets dead-letters list", markup=False)


def _check_tables(settings: Settings) -> None:
    """Evaluate the checks of the nightly schedule ``check_tables``, so that the UI shows results of all checks."""
    with hide_library_output():
        open_ingestion(settings).check_tables(triggered_by="demo")
