"""`fhir-assets dead-letters edit`."""

from pathlib import Path
from typing import Annotated

import typer

from fhir_assets.accounts import find_account
from fhir_assets.cli.dead_letter_options import By, Id, Json
from fhir_assets.cli.output import console, print_json
from fhir_assets.deployment.landing import build_receiver
from fhir_assets.deployment.validation import build_validator
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.pipeline.correct.step import Correction, CorrectionStep
from fhir_assets.settings import load_settings


def edit(
    dead_letter_id: Id,
    patch: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A JSON Patch (RFC 6902)")] = None,
    resource: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="The complete corrected resource; of a row of a visit file the row, as JSON or CSV",
        ),
    ] = None,
    by: By = None,
    json: Json = False,
) -> None:
    """Correct the resource of a dead letter. The original is kept, with the person and the time of the correction.

    The correction is used in place of the original when the resource is validated again: in a replay, or when its
    window is materialized.
    """
    if (patch is None) == (resource is None):
        raise ConfigurationError("pass either --patch FILE (a JSON Patch) or --resource FILE (the complete resource)")
    settings = load_settings()
    warehouse = Warehouse(settings)
    step = CorrectionStep(warehouse.connect, build_validator(settings), build_receiver(settings, warehouse))
    account = find_account()
    correction = Correction(
        patch.read_bytes() if patch else None,
        resource.read_bytes() if resource else None,
        by or account,
        actor=f"cli:{account}",
    )
    corrected = step.run(dead_letter_id, correction)
    received = corrected.stage == "fetch"
    if json:
        print_json({"id": dead_letter_id, "corrected_by": correction.by, "received": received})
    elif received:
        console.print(
            "The correction is stored and received: the sensor load_received or the next `fhir-assets ingest` loads it."
        )
    else:
        console.print(f"The correction is stored. Replay it: fhir-assets dead-letters replay {dead_letter_id}")
