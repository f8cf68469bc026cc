"""`fhir-assets reader`: the login of BI tools on the embedded Postgres."""

from typing import Annotated
from urllib.parse import quote

import typer

from fhir_assets.cli.output import console, print_json
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db import embedded, embedded_tcp, reader_login
from fhir_assets.warehouse.postgres.db.connections import connect


def reader(
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Print the host, port, login and password that BI tools connect with to the embedded Postgres.

    The login reader may read the tables of schema fhir and the views of schema marts. It is created by the first call;
    its password stays the same. The server listens on FHIR_POSTGRES_PORT of 127.0.0.1 and is left running.
    """
    settings = load_settings()
    port = _require_port(settings)
    Warehouse(settings).migrate()
    with connect(embedded.ensure(settings.home, port=port)) as conn:
        login = reader_login.ensure(conn, settings.home)
    _require_listening(settings, port)
    host, database = embedded_tcp.HOST, embedded.DATABASE
    url = f"postgresql://{login.user}:{quote(login.password, safe='')}@{host}:{port}/{database}"
    facts = {
        "host": host,
        "port": port,
        "database": database,
        "user": login.user,
        "password": login.password,
        "url": url,
        "password_file": str(login.file),
    }
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        console.print(f"{name.replace('_', ' '):14} {value}", markup=False, soft_wrap=True)


def _require_port(settings: Settings) -> int:
    if settings.db_url:
        raise ConfigurationError(
            "DB_URL is set: create a login on that server by "
            "`CREATE ROLE reader LOGIN PASSWORD '…' IN ROLE fhir_reader` (docs/tools.md)"
        )
    if settings.fhir_postgres_port is None:
        raise ConfigurationError(
            "FHIR_POSTGRES_PORT is not set: set it to a free port, such as 5433, in the environment or in .env"
        )
    return settings.fhir_postgres_port


def _require_listening(settings: Settings, port: int) -> None:
    """Raise ConfigurationError if the server was started with another port, and is in use."""
    if (current := embedded.find_port(settings.home)) != port:
        place = "has no TCP port" if current is None else f"listens on port {current}"
        raise ConfigurationError(
            f"The embedded Postgres {place}, because it was started before FHIR_POSTGRES_PORT was set to {port}, and "
            "it is in use: stop `fhir-assets dev` and other processes of this deployment, disconnect tools, then run "
            "`fhir-assets reader` again"
        )
