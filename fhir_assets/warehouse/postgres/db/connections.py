"""Connections to Postgres, with one clear sentence when there is none."""

import re
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql
from psycopg_pool import ConnectionPool

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.warehouse.postgres.db.connection_cache import CONNECTION_CACHE

OLDEST_SERVER = 15

Connection = psycopg.Connection[tuple[Any, ...]]
"""A connection to the warehouse. It carries the keys for what is read and written through it: ``sealing_of``."""

_SCHEME = re.compile(r"^postgres(?:ql)?(?:\+\w+)?://")
_HINTS = (
    ("password authentication failed", "the user or the password in DB_URL is wrong"),
    ("no password supplied", "DB_URL holds no password, and the server asks for one"),
    ("no pg_hba.conf entry", "the server does not admit this user from here (pg_hba.conf)"),
    ('" does not exist', "the database or the user in DB_URL does not exist there: create it first"),
)


class _Sealed(psycopg.Connection[tuple[Any, ...]]):
    cipher: Cipher = NO_ENCRYPTION
    kept_as: str | None = None
    """Where it waits for the next use when it is closed; None if it is closed then."""

    def close(self) -> None:
        """Give the connection back, or end it."""
        key, self.kept_as = self.kept_as, None
        if key is None or not CONNECTION_CACHE.keep(key, self):
            super().close()


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


def connect(url: str, *, autocommit: bool = False, timeout: int = 10, cipher: Cipher = NO_ENCRYPTION) -> Connection:
    """An open connection that speaks UTC; patient data goes through ``sealing`` on its way in and out.

    Raises DatabaseUnavailable if the server cannot be reached, ConfigurationError if it refuses us (password, rights,
    a database that is not there) or is too old. Neither message holds the password.
    """
    try:
        connection = _Sealed.connect(
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
    connection.cipher = cipher
    return connection


def borrow(url: str, *, cipher: Cipher = NO_ENCRYPTION) -> Connection:
    """As ``connect``: a connection of this process that was given back by ``close``, as good as new, or a new one."""
    connection = CONNECTION_CACHE.take(url) or connect(url)
    assert isinstance(connection, _Sealed)
    connection.cipher = cipher
    connection.kept_as = url
    # Prepared statements do not outlive the caller, who seldom says the same thing six times.
    connection.prepare_threshold = None
    return connection


def connection_pool(url: str, *, cipher: Cipher = NO_ENCRYPTION, size: int = 8) -> ConnectionPool[_Sealed]:
    """Up to ``size`` connections for a process that serves many short requests; closed until it is opened."""

    def carry_keys(connection: _Sealed) -> None:
        connection.cipher = cipher

    return ConnectionPool(
        normalise_url(url),
        connection_class=_Sealed,
        kwargs={
            "connect_timeout": 10,
            "application_name": "fhir_assets",
            "options": "-c TimeZone=UTC -c DateStyle=ISO",
        },
        min_size=1,
        max_size=size,
        timeout=10,
        max_idle=60,
        # Or it would wait, once the database is back, as long again as that was away.
        reconnect_timeout=2,
        configure=carry_keys,
        check=ConnectionPool.check_connection,
        open=False,
    )


def cipher_of(conn: psycopg.Connection[Any]) -> Cipher:
    """What seals the patient data that goes through a connection."""
    return conn.cipher if isinstance(conn, _Sealed) else NO_ENCRYPTION


def ensure_database(url: str, name: str) -> None:
    """Create the database ``name`` on the server of ``url`` if it is not there.

    Raises DatabaseUnavailable, or ConfigurationError if the user may not.
    """
    with connect(url, autocommit=True) as conn:
        if conn.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone() is not None:
            return
        try:
            conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        except (psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
            return
        except psycopg.errors.InsufficientPrivilege:
            raise ConfigurationError(
                f"The user of DB_URL may not create the database {name} at {_place(url)}: "
                f"have an administrator run `CREATE DATABASE {name}`"
            ) from None


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
