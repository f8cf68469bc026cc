"""`fhir-assets consents`: what patients allow, and the tables brought to it."""

import getpass
from datetime import UTC, datetime
from typing import Annotated

import typer

from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import consents

app = typer.Typer(help="What patients allow, and the tables brought to it.", no_args_is_help=True)

_LISTED = ("patient_id", "purpose", "decision", "consent_id", "version_id", "source", "decided_at", "changes_at")


@app.command("list")
def list_decisions(
    patient: Annotated[str | None, typer.Option(help="Of this patient")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000)] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """The decisions in force, and which provision of which Consent they come from."""
    with Warehouse(load_settings()).connect() as conn:
        found = consents.list_decisions(conn, patient=patient, limit=limit)
    if json:
        print_json(found)
    else:
        print_table("Consents", found, _LISTED)


@app.command()
def apply(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Take back what consent no longer covers, and bring what it now does. Runs do so by themselves."""
    settings = load_settings()
    sweep = ConsentStep(
        Warehouse(settings).connect,
        build_views(settings).views,
        build_consent_gate(settings),
        run_id="cli",
        actor=f"cli:{getpass.getuser()}",
    )
    swept = sweep.run(datetime.now(UTC))
    facts = {
        "patients": swept.patients,
        "decisions_changed": swept.decisions,
        "resources_withheld": swept.withheld,
        "resources_released": swept.released,
    }
    if json:
        print_json(facts)
    else:
        console.print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()))
