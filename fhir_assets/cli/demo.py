"""`fhir-assets demo`: the whole pipeline on a synthetic population, then the UI."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fhir_assets.cli.dev import serve_ui
from fhir_assets.cli.ingest import SUMMARY, load_due, report_failure, summary
from fhir_assets.cli.output import console, print_table, warn_of_clear_data
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.ingestion import select_failed
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxProcess
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import runs
from fhir_assets.warehouse.postgres.db import embedded

PATIENTS = 150
DAYS = 30
BAD_SHARE = 0.02
SEED = 1


class Windows(msgspec.Struct):
    """The range of the population that was generated, so that the next demo asks for the same windows."""

    start: datetime
    end: datetime


def demo(
    ui: Annotated[bool, typer.Option(help="Serve the Dagster UI afterwards")] = True,
    patients: Annotated[int, typer.Option(min=1, help="Size of the synthetic population")] = PATIENTS,
    port: Annotated[int | None, typer.Option(envvar="DAGSTER_PORT", help="Port of the UI; a free one if taken")] = None,
) -> None:
    """Load a synthetic population, about 2 % of it bad in known ways, from a sandbox FHIR server; then show the UI.

    All state is in FHIR_ASSETS_HOME (.fhir_assets/ if unset); a second demo finds its data.
    """
    settings = load_settings()
    if not settings.encrypts:
        warn_of_clear_data()
    home = settings.home
    folder = home / "sandbox"
    windows = _population(folder, patients)
    started = settings.db_url is None and not embedded.is_running(home)
    try:
        with SandboxProcess(folder / "population") as sandbox, _pointed_at(sandbox.url, windows):
            _load()
            if ui:
                serve_ui(load_settings(), port)
    finally:
        if started:
            embedded.stop(home)


def _population(folder: Path, patients: int) -> Windows:
    """The windows of an earlier demo's population, or of a new one that ends yesterday."""
    facts = folder / "windows.json"
    if facts.exists():
        return msgspec.json.decode(facts.read_bytes(), type=Windows)
    console.print(f"Generating {patients} synthetic patients …")
    end = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    windows = Windows(end - timedelta(days=DAYS), end)
    try:
        population = Population(patients, SEED, BAD_SHARE, end=windows.end, start=windows.start)
        write_population(folder / "population", population)
        facts.write_bytes(msgspec.json.encode(windows))
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {folder}: {error.strerror}. Set FHIR_ASSETS_HOME to a folder with room and rights"
        ) from None
    return windows


@contextmanager
def _pointed_at(url: str, windows: Windows) -> Iterator[None]:
    """The environment of every process that the demo starts: its own server, its own windows."""
    ours = {
        "FHIR_BASE_URL": url,
        "FHIR_SOURCE": "search",
        "FHIR_LAST_UPDATED_GTE": windows.start.isoformat(),
        "FHIR_PARTITION": "daily",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _load() -> None:
    settings = load_settings()
    console.print(f"Sandbox FHIR server: {settings.fhir_base_url}")
    outcomes = load_due(settings, triggered_by="demo")
    with Warehouse(settings).connect() as conn:
        everything = runs.summarize_latest(conn)
    if loaded := summary(settings, outcomes):
        print_table("Loaded now", loaded, SUMMARY)
    else:
        print_table("Loaded earlier", everything, SUMMARY[:-1])
    for outcome in select_failed(outcomes):
        report_failure(settings, outcome)
    if select_failed(outcomes):
        raise typer.Exit(1)
    where = "the database of DB_URL" if settings.db_url else f"psql '{Warehouse(settings).url()}'"
    console.print(f"Tables: schema fhir, {where}", markup=False, soft_wrap=True)
    console.print("Dead letters: fhir-assets dead-letters list", markup=False)
