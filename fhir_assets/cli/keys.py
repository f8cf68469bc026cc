"""`fhir-assets keys`: the keys that seal patient data."""

from typing import Annotated

import typer

from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.privacy.keys import new_key
from fhir_assets.resources.warehouse import Warehouse
from fhir_assets.settings import load_settings
from fhir_assets.warehouse import vault

app = typer.Typer(help="The keys that seal patient data.", no_args_is_help=True)


@app.command()
def new() -> None:
    """Make a key. It belongs into PHI_ENCRYPTION_KEYS, before those that are there, and where it cannot get lost."""
    typer.echo(new_key())


@app.command()
def status(json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """The keys that are set, by their ids, and how many resources and dead letters each one seals."""
    settings = load_settings()
    with Warehouse(settings).connect() as conn:
        sealed = vault.sealed_rows(conn)
    none = {"resources": 0, "dead_letters": 0}
    ids: list[str | None] = [key.id for key in settings.sealing.keys]
    rows = [
        {
            "key": key_id or "in the clear",
            "set": key_id is None or key_id in ids,
            "newest": key_id == settings.sealing.key_id,
            **sealed.get(key_id, none),
        }
        for key_id in dict.fromkeys([*ids, *sealed])
    ]
    if json:
        print_json(rows)
        return
    print_table("Keys", rows, ("key", "set", "newest", "resources", "dead_letters"))
    if not settings.sealing.on:
        console.print("Patient data is stored in the clear: `fhir-assets keys new`, then set PHI_ENCRYPTION_KEYS.")
