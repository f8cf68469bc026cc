"""`fhir-assets patient`: print the decrypted resources of a patient; each access is recorded in the audit log."""

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from fhir_assets.accounts import find_account
from fhir_assets.cli.output import console, errors
from fhir_assets.control_characters import escape_control_characters
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.queries.patients import find_patients, read_patient

app = typer.Typer(
    help="Print patient data, decrypted with the keys of this deployment. Every access is recorded in the audit log."
)


@app.callback()
def patient() -> None:
    """Print patient data, decrypted with the keys of this deployment. Every access is recorded in the audit log."""


@app.command()
def show(
    patient_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="The logical id of the Patient resource")
    ] = None,
    identifier: Annotated[str | None, typer.Option(help="Find the patient by an identifier, such as the MRN")] = None,
    everything: Annotated[bool, typer.Option(help="Print all resources of the patient, not only the Patient")] = False,
) -> None:
    """Print the resources of a patient as NDJSON on stdout, after writing an audit record."""
    if (patient_id is None) == (identifier is None):
        raise ConfigurationError("pass either the id of a Patient or --identifier")
    settings = load_settings()
    warehouse = Warehouse(settings)
    if (consent_gate := build_consent_gate(settings)).withholds:
        # A posted Consent takes effect before the tables are updated.
        actor = f"cli:{find_account()}"
        step = ConsentStep(warehouse.connect, build_views(settings).views, consent_gate, run_id="cli", actor=actor)
        step.run(datetime.now(UTC))
    with warehouse.connect() as conn:
        ids = [patient_id] if patient_id is not None else find_patients(conn, identifier or "")
        resources = [
            resource
            for found_id in ids
            for resource in read_patient(conn, found_id, actor=f"cli:{find_account()}", everything=everything)
        ]
    for resource in resources:
        line = resource.body.decode()
        # A program gets the bytes as received.
        sys.stdout.write((escape_control_characters(line) if sys.stdout.isatty() else line) + "\n")
    if not resources:
        errors.print("The tables contain no such patient.")
        raise typer.Exit(1)
    if sys.stdout.isatty():
        console.print(f"{len(resources)} resources. This access is in the audit log: `fhir-assets audit list`.")
