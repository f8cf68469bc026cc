"""`fhir-assets consents`: list the consent decisions of patients and apply them to the tables."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from fhir_assets.accounts import find_account
from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import consents

app = typer.Typer(help="List the consent decisions of patients and apply them to the tables.", no_args_is_help=True)

_COLUMNS = ("patient_id", "purpose", "decision", "consent_id", "version_id", "source", "decided_at", "changes_at")


@app.command("list")
def list_decisions(
    patient: Annotated[str | None, typer.Option(help="Only decisions of this patient (id)")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Print at most this many")] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """List the decisions in force, with the Consent and the provision that they come from."""
    with Warehouse(load_settings()).connect() as conn:
        decisions = consents.list_decisions(conn, patient=patient, limit=limit)
    if json:
        print_json(decisions)
    else:
        print_table("Consents", decisions, _COLUMNS)


@app.command()
def apply(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Remove resources from the tables that consent now withholds, and load those that it now allows.

    Runs do this automatically.
    """
    settings = load_settings()
    step = ConsentStep(
        Warehouse(settings).connect,
        build_views(settings).views,
        build_consent_gate(settings),
        run_id="cli",
        actor=f"cli:{find_account()}",
    )
    result = step.run(datetime.now(UTC))
    facts = {
        "patients": result.patients,
        "decisions_changed": result.decisions,
        "resources_withheld": result.withheld,
        "resources_released": result.released,
    }
    if json:
        print_json(facts)
    else:
        console.print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()))
