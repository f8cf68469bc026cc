"""`fhir-assets validate`: validate files without loading them."""

from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fhir_assets.cli.output import console, errors, print_json, print_table
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.report import ValidationSummary, build_located_outcome, validate_files
from fhir_assets.settings import load_settings


def validate(
    files: Annotated[
        list[Path], typer.Argument(help="Files of NDJSON, a resource or a Bundle; also .gz", metavar="FILE…")
    ],
    outcomes: Annotated[
        Path | None, typer.Option(help="File for the OperationOutcomes of resources with issues, as NDJSON")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON")] = False,
) -> None:
    """Validate every resource against the rules of FHIR R4. The exit code is 1 if a resource is invalid."""
    settings = load_settings()
    validator = Validator(
        warn_rules=settings.validation_warn_rules,
        max_bytes=settings.validation_max_bytes,
        max_depth=settings.validation_max_depth,
    )
    tally = ValidationSummary()
    try:
        sink = outcomes.open("wb") if outcomes else None
    except OSError as error:
        raise ConfigurationError(f"cannot write {outcomes}: {error.strerror}; pass another --outcomes") from None
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=errors,
        disable=not errors.is_terminal,
    )  # fmt: skip
    with bar:
        for file in bar.track(files, description="Validating"):
            for checked in validate_files([file], validator):
                tally.add(checked.result)
                if sink and checked.result.issues:
                    sink.write(orjson.dumps(build_located_outcome(checked)) + b"\n")
    if sink:
        sink.close()
    if json:
        print_json({"resources": tally.resources, "invalid": tally.invalid, "findings": tally.rows()})
    else:
        if rows := tally.rows():
            print_table("Findings", rows, ("severity", "rule", "path", "count"))
        console.print(f"{tally.resources:,} resources, {tally.invalid:,} invalid")
    if tally.invalid:
        raise typer.Exit(1)
