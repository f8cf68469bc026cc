"""The login ``reader`` of the embedded Postgres, for BI tools: a member of ``fhir_reader`` with a random password."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql

from fhir_assets.atomic_files import build_temporary_path
from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.db.role_rights import READER

LOGIN = "reader"
_PASSWORD_FILE = "reader_password"
_MAX_CONNECTIONS = 40
"""Far fewer than the server has, so that a dashboard cannot take the connections of loads."""


@dataclass(frozen=True)
class ReaderLogin:
    """The name of the login, its password, and the file with the password."""

    user: str
    password: str
    file: Path


def ensure(conn: Connection, home: Path) -> ReaderLogin:
    """Create the login if needed, and give it the password of the file in ``home``, which is created once.

    The connection is that of the superuser. Raises ConfigurationError if the file cannot be read or written.
    """
    file = home / _PASSWORD_FILE
    password = _read_password(file)
    # Concurrent calls would create the role twice, or update its row at the same time.
    conn.execute("SELECT pg_advisory_xact_lock(hashtext('fhir_assets reader login'))")
    if conn.execute("SELECT FROM pg_roles WHERE rolname = %s", [LOGIN]).fetchone() is None:
        conn.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(LOGIN)))
    verifier = conn.pgconn.encrypt_password(password.encode(), LOGIN.encode(), b"scram-sha-256").decode()
    conn.execute(
        sql.SQL(
            "ALTER ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS "
            "CONNECTION LIMIT {} PASSWORD {}"
        ).format(sql.Identifier(LOGIN), sql.Literal(_MAX_CONNECTIONS), sql.Literal(verifier))
    )
    conn.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(READER), sql.Identifier(LOGIN)))
    conn.commit()
    return ReaderLogin(LOGIN, password, file)


def _read_password(file: Path) -> str:
    """Return the password of the file. The first call creates the file, which only its owner may read."""
    try:
        if not file.exists():
            _create(file, secrets.token_urlsafe(24))
        password = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise ConfigurationError(
            f"The password of the login {LOGIN} cannot be read from {file} ({reason}): "
            "run as the user who owns the file, or remove it to get a new password"
        ) from None
    if not password:
        raise ConfigurationError(f"{file} is empty: remove it, so that the login {LOGIN} gets a new password")
    return password


def _create(file: Path, password: str) -> None:
    """Create the file with its complete content, unless another process creates it first."""
    temporary = build_temporary_path(file)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as stream:
            stream.write(password + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, file)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)
