"""`fhir-assets patient`: a patient's resources, decrypted, on record."""

import getpass
import sys
from typing import Annotated

import typer

from fhir_assets.cli.output import console, errors
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.queries.patients import find_patients, read_patient

app = typer.Typer(help="Patient data, decrypted for those who hold the keys; each reading is on record.")


@app.callback()
def patient() -> None:
    """Patient data, decrypted for those who hold the keys; each reading is on record."""


@app.command()
def show(
    patient_id: Annotated[str | None, typer.Argument(metavar="ID", help="The Patient's logical id")] = None,
    identifier: Annotated[str | None, typer.Option(help="Find it by an identifier, such as the MRN")] = None,
    everything: Annotated[bool, typer.Option(help="All resources of the patient, not the Patient alone")] = False,
) -> None:
    """Print a patient's resources as NDJSON on stdout. Writes a record into the audit log first."""
    if (patient_id is None) == (identifier is None):
        raise ConfigurationError("give either a Patient's id or --identifier")
    with Warehouse(load_settings()).connect() as conn:
        ids = [patient_id] if patient_id is not None else find_patients(conn, identifier or "")
        found = [
            resource
            for each in ids
            for resource in read_patient(conn, each, actor=f"cli:{getpass.getuser()}", everything=everything)
        ]
    for resource in found:
        sys.stdout.write(resource.body.decode() + "\n")
    if not found:
        errors.print("No such patient in the tables.")
        raise typer.Exit(1)
    if sys.stdout.isatty():
        console.print(f"{len(found)} resources; this reading is on record: `fhir-assets audit list`.")
