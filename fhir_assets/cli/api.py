"""`fhir-assets api`: the HTTP API, and tokens for it."""

import os
from typing import Annotated

import typer

from fhir_assets.api import WORKERS_VARIABLE
from fhir_assets.api.access import Role, create_token, parse_tokens
from fhir_assets.cli.output import console, print_json
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.metrics.exposition import serve_metrics
from fhir_assets.metrics.pipeline import register_database_metrics
from fhir_assets.settings import load_settings

app = typer.Typer(help="The HTTP API: intake, look-ups, runs.", invoke_without_command=True)


@app.callback()
def serve(
    context: typer.Context,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="In place of API_PORT")] = None,
    host: Annotated[str | None, typer.Option(help="In place of API_HOST")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that serve")] = 1,
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are answered. `fhir-assets api token NAME ROLE` lets one in."""
    if context.invoked_subcommand is not None:
        return
    import uvicorn  # not for every command

    settings = load_settings()
    if not parse_tokens(settings.api_tokens.get_secret_value() if settings.api_tokens else ""):
        raise ConfigurationError(
            "API_TOKENS is not set: nobody could call anything. `fhir-assets api token NAME ROLE` makes a token"
        )
    warehouse = Warehouse(settings)
    warehouse.url()
    os.environ[WORKERS_VARIABLE] = str(workers)
    with (
        register_database_metrics(settings, warehouse.connect),
        serve_metrics(settings.metrics_host, settings.metrics_port),
    ):
        uvicorn.run(
            "fhir_assets.api.app:create_worker_app",
            factory=True,
            host=host or settings.api_host,
            port=settings.api_port if port is None else port,
            workers=workers,
            # Its access log would hold what is searched for; the API writes its own.
            access_log=False,
            server_header=False,
            date_header=True,
            log_level="warning",
            timeout_graceful_shutdown=30,
        )


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Whose it is, as the audit log names it")],
    role: Annotated[Role, typer.Argument(help="What it is for")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Make a token: the secret for the caller, and its entry in API_TOKENS for this side. The secret is shown once."""
    secret, entry = create_token(name, role)
    if json:
        print_json({"token": secret, "entry": entry})
        return
    console.print(f"Token, for {name} alone:  {secret}", markup=False, soft_wrap=True)
    console.print(f"Add to API_TOKENS:  {entry}", markup=False, soft_wrap=True)
