"""`fhir-assets roles`: the roles in the database, one for each kind of process or person, and their rights."""

import os
from typing import Annotated
from urllib.parse import unquote, urlsplit

import typer

from fhir_assets.cli.output import console, print_json, print_table
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db import connections, process_roles

_LOGINS = tuple(process_roles.LOGINS.values())


def roles(
    logins: Annotated[
        bool, typer.Option("--logins", help="Also create a login for each process, such as fhir_assets_loader")
    ] = False,
    password_env: Annotated[
        str | None,
        typer.Option(
            help="With --logins: the environment variable that has the password of the logins. With {} in its name, "
            "such as POSTGRES_{}_PASSWORD, each login has its own: POSTGRES_LOADER_PASSWORD, …"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Create the roles of all processes and grant each its rights, here and in Dagster's database; revoke all others.

    Run it as the owner of the database: after a restore into another server, which has no roles, or with --logins, to
    run each process with the rights that it needs. A second call changes nothing.
    """
    settings = load_settings()
    passwords = _read_passwords(password_env, settings) if password_env else {}
    config.ensure_dagster_database(settings)
    with Warehouse(settings).connect() as conn, connections.connect(config.find_dagster_url(settings)) as dagster_conn:
        process_roles.grant_all(conn, dagster_conn)
        if logins:
            process_roles.ensure_logins(conn, passwords)
        rows = process_roles.describe(conn)
    if json:
        print_json(rows)
        return
    print_table("Roles", rows, ("role", "for", "login"))
    if logins and (unset := [login for login in _LOGINS if login not in passwords]):
        console.print(
            f"No password was given for {', '.join(unset)}: who is new has none. Set it by `\\password LOGIN` in psql, "
            "or with --password-env.",
            soft_wrap=True,
        )


def _read_passwords(variable: str, settings: Settings) -> dict[str, str]:
    """Return the passwords by login. A login whose own variable is not set is left out. Raises ConfigurationError."""
    names = {login: variable.replace("{}", login.removeprefix("fhir_assets_").upper()) for login in _LOGINS}
    passwords = {login: password for login, name in names.items() if (password := os.environ.get(name))}
    if not passwords:
        examples = " and the like" if "{}" in variable else ""
        raise ConfigurationError(
            f"--password-env names {names[_LOGINS[0]]}{examples}, which is not set: set it to the password"
        )
    if "{}" in variable:
        named = {names[login]: password for login, password in passwords.items()}
        url = urlsplit(settings.db_url.get_secret_value()) if settings.db_url else None
        if url and url.password:
            named["the password of the user of DB_URL"] = unquote(url.password)
        if equal := sorted(name for name, password in named.items() if [*named.values()].count(password) > 1):
            raise ConfigurationError(
                f"{' and '.join(equal)} are the same, so that a process could connect as another: set another password "
                "for each login"
            )
    return passwords
