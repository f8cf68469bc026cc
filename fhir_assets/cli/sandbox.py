"""`fhir-assets sandbox` and `fhir-assets generate`: a FHIR server for tests and demos, and synthetic data for it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.errors import ConfigurationError
from fhir_assets.sandbox.faults import FaultPlan
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import serve


def sandbox(
    port: Annotated[int, typer.Option(help="TCP port; 0 selects a free port")] = 8090,
    data: Annotated[Path | None, typer.Option(help="Folder of NDJSON files to serve")] = None,
    empty: Annotated[bool, typer.Option("--empty", help="Start with no resources")] = False,
    faults: Annotated[
        str | None, typer.Option(help="Faults to simulate, as JSON; see fhir_assets/sandbox/faults.py")
    ] = None,
) -> None:
    """Run a small FHIR R4 server at http://127.0.0.1:PORT/fhir until Ctrl-C."""
    if (data is None) != empty:
        raise ConfigurationError("pass either --data DIR or --empty")
    serve(data, port, FaultPlan.model_validate_json(faults) if faults else None)


def generate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files <Type>.ndjson.gz")] = Path(
        "population"
    ),
    patients: Annotated[int, typer.Option(min=1, help="Number of patients")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the random generator")] = 1,
    bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of resources with deliberate defects, 0 to 1")
    ] = 0.0,
    start: Annotated[datetime, typer.Option(help="First meta.lastUpdated (UTC)")] = datetime(2024, 1, 1),
    end: Annotated[datetime, typer.Option(help="Last meta.lastUpdated (UTC)")] = datetime(2024, 3, 31),
    json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON")] = False,
) -> None:
    """Write a synthetic population: valid, linked resources of all 30 types. Equal seeds give equal resources."""
    population = Population(patients, seed, bad_share, end=end.replace(tzinfo=UTC), start=start.replace(tzinfo=UTC))
    try:
        written = write_population(output, population)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {output}: {error.strerror}; free space, or pass another --output"
        ) from None
    if json:
        print_json({"output": str(output), "types": written.resources, "defects": written.defects})
        return
    rows = [{"type": name, "resources": count, "bad": written.bad[name]} for name, count in written.resources.items()]
    print_table(f"Written to {output}", rows, ("type", "resources", "bad"))
    if written.defects:
        defects = [{"defect": name, "resources": count} for name, count in written.defects.items()]
        print_table("Deliberate defects", defects, ("defect", "resources"))
    console.print(f"{written.resources.total():,} resources")
