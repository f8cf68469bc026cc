"""`fhir-assets api`: serve the HTTP API and create tokens for it."""

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

app = typer.Typer(
    help="Serve the HTTP API (intake of records, patient look-ups, runs) and create tokens for it.",
    invoke_without_command=True,
)


@app.callback()
def serve(
    context: typer.Context,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port; default: API_PORT")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: API_HOST")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Number of worker processes")] = 1,
) -> None:
    """Serve the HTTP API until SIGTERM or Ctrl-C; requests in progress are answered first.

    Callers need a token: `fhir-assets api token NAME ROLE` creates one.
    """
    if context.invoked_subcommand is not None:
        return
    # imported here, because they are slow and other commands do not need them
    import uvicorn

    from fhir_assets.connection_limits import LimitedProtocol

    settings = load_settings()
    if not parse_tokens(settings.api_tokens.get_secret_value() if settings.api_tokens else ""):
        raise ConfigurationError(
            "API_TOKENS is not set, so every request would be refused: create a token with "
            "`fhir-assets api token NAME ROLE`"
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
            http=LimitedProtocol,
            ws="none",
            host=host or settings.api_host,
            port=settings.api_port if port is None else port,
            workers=workers,
            # The access log of uvicorn contains search parameters; the API writes its own without them.
            access_log=False,
            server_header=False,
            date_header=True,
            log_level="warning",
            timeout_graceful_shutdown=30,
        )


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="The caller's name in the audit log")],
    role: Annotated[Role, typer.Argument(help="The operations that the token may call")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Create a token: the secret for the caller, and the entry for API_TOKENS. The secret is printed only this once."""
    secret, entry = create_token(name, role)
    if json:
        print_json({"token": secret, "entry": entry})
        return
    console.print(f"Token for {name}:  {secret}", markup=False, soft_wrap=True)
    console.print(f"Add to API_TOKENS:  {entry}", markup=False, soft_wrap=True)
