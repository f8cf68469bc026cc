"""Puts the commands together and turns the project's errors into one sentence and an exit code."""

import logging
import sys

import typer
from rich.console import Console

from fhir_assets.cli import (
    api,
    audit,
    connector,
    consents,
    dead_letters,
    demo,
    dev,
    export,
    ingest,
    keys,
    landing,
    migrate,
    missing,
    patient,
    prune,
    runs,
    sandbox,
    upload,
    validate,
    view,
    worker,
)
from fhir_assets.errors import FhirAssetsError
from fhir_assets.logs import described

app = typer.Typer(
    name="fhir-assets",
    help="FHIR data out of clinical servers and into Postgres tables that people trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("dev")(dev.dev)
app.command("migrate")(migrate.migrate)
app.command("ingest")(ingest.ingest)
app.add_typer(landing.app, name="landing")
app.add_typer(runs.app, name="runs")
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(missing.app, name="missing-references")
app.add_typer(patient.app, name="patient")
app.add_typer(consents.app, name="consents")
app.add_typer(audit.app, name="audit")
app.add_typer(keys.app, name="keys")
app.command("export")(export.export)
app.command("validate")(validate.validate)
app.add_typer(view.app, name="view")
app.command("upload")(upload.upload)
app.add_typer(connector.app, name="connector")
app.command("worker")(worker.worker)
app.command("prune")(prune.prune)
app.add_typer(api.app, name="api")
app.command("sandbox")(sandbox.sandbox)
app.command("generate")(sandbox.generate)


def main() -> None:
    """Run the command line; an error of the project is one sentence on stderr and exit code 1."""
    # A line of log that cannot be written any more must not become a stack trace on the terminal.
    logging.raiseExceptions = False
    try:
        app()
    except FhirAssetsError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"fhir-assets: {error}", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # A driver's message may quote a row, so no stack trace: its type, and the places it came through.
        found = described(error)
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"fhir-assets: unexpected {found['type']} at {found['at']}: this is a defect, please report it with these "
            "words",
            markup=False,
        )
        sys.exit(1)
