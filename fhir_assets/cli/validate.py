"""`fhir-assets validate`: validate files without loading them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, BinaryIO

import orjson
import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fhir_assets.cli.output import console, errors, open_output, print_json, print_table
from fhir_assets.fhir.files.json_texts import find_files
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.validation.report import (
    CheckedResource,
    UnreadablePart,
    ValidationSummary,
    build_located_outcome,
    validate_files,
)
from fhir_assets.settings import load_settings


def validate(
    files: Annotated[
        list[Path],
        typer.Argument(help="Files of NDJSON, a resource or a Bundle, or folders; also .gz", metavar="FILE…"),
    ],
    outcomes: Annotated[
        Path | None,
        typer.Option(help="File for the OperationOutcomes of resources with issues, as NDJSON; -: stdout"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON")] = False,
) -> None:
    """Validate every resource against the rules of FHIR R4.

    The exit code is 1 if a resource is invalid, or if a part of a file cannot be read.
    """
    settings = load_settings()
    validator = Validator(
        warn_rules=settings.validation_warn_rules,
        max_bytes=settings.validation_max_bytes,
        max_depth=settings.validation_max_depth,
    )
    summary = ValidationSummary()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=errors,
        disable=not errors.is_terminal,
    )  # fmt: skip
    with nullcontext() if outcomes is None else open_output(outcomes, "--outcomes") as sink, bar:
        for file in bar.track(find_files(files), description="Validating"):
            for checked in validate_files([file], validator):
                _record_result(checked, summary, sink)
    if json:
        print_json(
            {
                "resources": summary.resources,
                "invalid": summary.invalid,
                "unreadable": summary.unreadable,
                "findings": summary.rows(),
            }
        )
    else:
        if rows := summary.rows():
            print_table("Findings", rows, ("severity", "rule", "path", "count"))
        unreadable = f", {summary.unreadable:,} parts of files cannot be read" if summary.unreadable else ""
        console.print(f"{summary.resources:,} resources, {summary.invalid:,} invalid{unreadable}")
    if summary.invalid or summary.unreadable:
        raise typer.Exit(1)


def _record_result(
    checked: CheckedResource | UnreadablePart, summary: ValidationSummary, sink: BinaryIO | None
) -> None:
    """Add a result to the summary, and write the OperationOutcome of its issues to ``sink``."""
    if isinstance(checked, UnreadablePart):
        summary.unreadable += 1
        errors.print(f"{checked.location}: cannot be read: {checked.message}", markup=False, soft_wrap=True)
        return
    summary.add(checked.result)
    if sink and checked.result.issues:
        sink.write(orjson.dumps(build_located_outcome(checked)) + b"\n")
