"""`fhir-assets roles`: the roles in the database, one for each kind of process or person, and their rights."""

import os
from typing import Annotated

import typer

from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import connections, process_roles


def roles(
    logins: Annotated[
        bool, typer.Option("--logins", help="Also create a login for each process, such as fhir_assets_loader")
    ] = False,
    password_env: Annotated[
        str | None, typer.Option(help="With --logins: the environment variable that has the password of the logins")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Create the roles of all processes and grant each its rights, here and in Dagster's database; revoke all others.

    Run it as the owner of the database: after a restore into another server, which has no roles, or with --logins, to
    run each process with the rights that it needs. A second call changes nothing.
    """
    password = _read_password(password_env)
    settings = load_settings()
    config.ensure_dagster_database(settings)
    with Warehouse(settings).connect() as conn, connections.connect(config.find_dagster_url(settings)) as dagster_conn:
        process_roles.grant_all(conn, dagster_conn)
        if logins:
            process_roles.ensure_logins(conn, password)
        rows = process_roles.describe(conn)
    if json:
        print_json(rows)
        return
    print_table("Roles", rows, ("role", "for", "login"))
    if logins and not password:
        console.print(
            "Logins that are new have no password: set it by `\\password LOGIN` in psql, or with --password-env."
        )


def _read_password(variable: str | None) -> str | None:
    if variable is None:
        return None
    password = os.environ.get(variable)
    if not password:
        raise ConfigurationError(f"--password-env names {variable}, which is not set: set it to the password")
    return password
