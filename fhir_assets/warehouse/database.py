"""Connections to Postgres, with one clear sentence when there is none."""

import re
from collections.abc import Sequence
from typing import Any, LiteralString
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable

OLDEST_SERVER = 15

Connection = psycopg.Connection[tuple[Any, ...]]

_SCHEME = re.compile(r"^postgres(?:ql)?(?:\+\w+)?://")
_HINTS = (
    ("password authentication failed", "the user or the password in DB_URL is wrong"),
    ("no password supplied", "DB_URL holds no password, and the server asks for one"),
    ("no pg_hba.conf entry", "the server does not admit this user from here (pg_hba.conf)"),
    ('" does not exist', "the database or the user in DB_URL does not exist there: create it first"),
)


def normalise_url(url: str, driver: str | None = None) -> str:
    """``url`` with the scheme that a library wants: plain for psycopg, ``postgresql+<driver>`` for SQLAlchemy.

    Raises ConfigurationError if it is not a Postgres URL.
    """
    if not _SCHEME.match(url):
        raise ConfigurationError("DB_URL must look like postgresql://user:password@host:5432/database")
    return _SCHEME.sub(f"postgresql+{driver}://" if driver else "postgresql://", url)


def with_database(url: str, database: str) -> str:
    """``url`` with the database's name replaced."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"/{quote(database, safe='')}"))


def connect(url: str, *, autocommit: bool = False, timeout: int = 10) -> Connection:
    """An open connection that speaks UTC.

    Raises DatabaseUnavailable if the server cannot be reached, ConfigurationError if it refuses us (password, rights,
    a database that is not there) or is too old. Neither message holds the password.
    """
    try:
        connection: Connection = psycopg.connect(
            normalise_url(url),
            autocommit=autocommit,
            connect_timeout=timeout,
            application_name="fhir_assets",
            options="-c TimeZone=UTC -c DateStyle=ISO",
        )
    except psycopg.OperationalError as error:
        raise _explained(url, error) from None
    except psycopg.Error:
        raise ConfigurationError(f"DB_URL cannot be understood: {_place(url)}") from None
    if connection.info.server_version // 10_000 < OLDEST_SERVER:
        version = connection.info.server_version // 10_000
        connection.close()
        raise ConfigurationError(f"Postgres {version} at {_place(url)} is too old: {OLDEST_SERVER} or newer is needed")
    return connection


def table_exists(conn: Connection, schema: str, name: str) -> bool:
    """Whether ``schema.name`` is there and may be seen."""
    found = conn.execute("SELECT to_regclass(%s)", [sql.Identifier(schema, name).as_string(conn)]).fetchone()
    return found is not None and found[0] is not None


def fetch_all(conn: Connection, query: LiteralString | sql.Composed, params: Sequence[object] = ()) -> list[Any]:
    """Every row of a query whose result is known to be small."""
    return conn.execute(query, params).fetchall()


def _explained(url: str, error: psycopg.OperationalError) -> ConfigurationError | DatabaseUnavailable:
    text = str(error)
    for sign, reason in _HINTS:
        if sign in text:
            return ConfigurationError(f"Postgres at {_place(url)} refused the connection: {reason}")
    reason = text.strip().splitlines()[-1].strip() if text.strip() else type(error).__name__
    password = urlsplit(url).password
    if password:
        reason = reason.replace(password, "***")
    return DatabaseUnavailable(
        f"Postgres at {_place(url)} cannot be reached ({reason}): start it, or correct DB_URL, then try again"
    )


def _place(url: str) -> str:
    """Host and database of a URL, without the user's secrets."""
    try:
        info = psycopg.conninfo.conninfo_to_dict(normalise_url(url))
    except (psycopg.Error, ConfigurationError):
        return "the address in DB_URL"
    return f"{info.get('host') or 'localhost'}:{info.get('port') or 5432}/{info.get('dbname') or ''}"
