"""TCP connections to the embedded Postgres: from this machine, for readers only, with a password.

Without a port the server has only its socket. With one it also listens on 127.0.0.1, and only members of
``fhir_reader`` may connect there, only to the database of the tables, with a password (scram-sha-256). The server's
superuser has no password and is no member of that role, so that it cannot connect by TCP.
"""

import errno
import os
import socket
from pathlib import Path
from typing import Any

import psycopg

from fhir_assets.atomic_files import replace_content
from fhir_assets.errors import ConfigurationError

HOST = "127.0.0.1"
SOCKET = ".s.PGSQL.5432"
"""The name of the socket in all URLs. Postgres names its socket after the port; for another port this is a link."""

_ACCESS_FILE = "pg_hba_tcp.conf"
_ACCESS_RULES = b"""# Written by fhir_assets at each start with FHIR_POSTGRES_PORT: changes are lost.
# TYPE  DATABASE     USER          ADDRESS       METHOD
local   all          all                         trust
host    fhir_assets  +fhir_reader  127.0.0.1/32  scram-sha-256
"""


def prepare(data: Path, socket_folder: Path, port: int | None, uid: int, gid: int) -> dict[str, str]:
    """Write the files that a server with this port needs, and return its options. No server may be running.

    ``uid`` and ``gid`` are those of the server's user.
    """
    unlink_socket(socket_folder)
    if port is None:
        return {"listen_addresses": ""}
    rules = data / _ACCESS_FILE
    replace_content(rules, _ACCESS_RULES)
    os.chown(rules, uid, gid)
    if (name := f".s.PGSQL.{port}") != SOCKET:
        # Before the server starts: a process that is killed in between leaves a link, which a start replaces, not a
        # server that nobody finds. URLs of processes that run on stay valid when the port changes.
        (socket_folder / SOCKET).unlink(missing_ok=True)
        (socket_folder / SOCKET).symlink_to(name)
    return {"listen_addresses": HOST, "port": str(port), "hba_file": str(rules)}


def unlink_socket(socket_folder: Path) -> None:
    """Remove the link to the socket of another port, if there is one."""
    if (socket_folder / SOCKET).is_symlink():
        (socket_folder / SOCKET).unlink(missing_ok=True)


def require_free(port: int | None) -> None:
    """Raise ConfigurationError if another program listens on this port of 127.0.0.1."""
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = (
                "another program uses the port" if error.errno == errno.EADDRINUSE else os.strerror(error.errno or 0)
            )
            raise ConfigurationError(
                f"The embedded Postgres cannot listen on {HOST}:{port} ({reason}): "
                "set FHIR_POSTGRES_PORT to another port, or unset it"
            ) from None


def read_port(conn: psycopg.Connection[Any]) -> int | None:
    """Return the TCP port that the server of a connection listens on, None if it listens on none."""
    row = conn.execute("SELECT current_setting('listen_addresses'), current_setting('port')").fetchone()
    return int(row[1]) if row and row[0] else None
