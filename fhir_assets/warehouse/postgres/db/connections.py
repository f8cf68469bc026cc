"""Connections to Postgres.

``connect(url)`` opens a plain connection. ``connect(url, cipher=…)`` opens a ``Session``, a connection that carries the
cipher of the patient data that is read and written through it. Functions that touch patient data take a ``Session``, so
that mypy refuses a plain connection there; at run time ``cipher_of`` raises ``MissingCipher``.
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self, TypeVar, overload
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql
from psycopg_pool import ConnectionPool

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable, MissingCipher
from fhir_assets.foreign_errors import note_login
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.sources import DEFAULT_SOURCE, require_source_key
from fhir_assets.warehouse.postgres.db import time_loaders
from fhir_assets.warehouse.postgres.db.connection_cache import CONNECTION_CACHE

OLDEST_SERVER = 15
"""The oldest major version of Postgres that is supported."""

Connection = psycopg.Connection[tuple[Any, ...]]
"""Any connection to a database of the project. Patient data is read and written through a ``Session`` only."""

T = TypeVar("T")

_ATTEMPTS = 3
_CONCURRENT_UPDATE_SECONDS = 3.0
_SCHEME = re.compile(r"^postgres(?:ql)?(?:\+\w+)?://")
_HINTS = (
    ("password authentication failed", "the user or the password in DB_URL is wrong"),
    ("no password supplied", "the server requires a password, and DB_URL contains none"),
    ("no pg_hba.conf entry", "the server does not admit this user from this host (pg_hba.conf)"),
    ('" does not exist', "the database or the user in DB_URL does not exist there: create it first"),
)


class _Cursor(psycopg.Cursor[tuple[Any, ...]]):
    """A cursor that keeps the login with an error about a missing right."""

    def execute(self, *args: Any, **options: Any) -> Self:
        try:
            return super().execute(*args, **options)
        except psycopg.errors.InsufficientPrivilege as error:
            note_login(error, self.connection.info.user)
            raise


class Session(psycopg.Connection[tuple[Any, ...]]):
    """A connection with the cipher of the patient data that is read and written through it, and with its source.

    Without encryption keys the cipher is ``NO_ENCRYPTION``, which is also set explicitly. ``on_audit`` is called with
    the number of an audit record that is written through it, before the transaction is committed.
    """

    cipher: Cipher
    source: str = DEFAULT_SOURCE
    on_audit: Callable[[int], None] | None = None


OpenConnection = Callable[[], AbstractContextManager[Connection]]
"""Opens a connection for a ``with`` block. At its end the connection is closed or returned to its pool."""

OpenSession = Callable[[], AbstractContextManager[Session]]
"""Opens a session for a ``with`` block. At its end the transaction is committed, or rolled back after an error."""


def normalise_url(url: str, driver: str | None = None) -> str:
    """Return ``url`` with the scheme ``postgresql``, or ``postgresql+<driver>`` for SQLAlchemy.

    Raises ConfigurationError if it is not the URL of a Postgres database.
    """
    if not _SCHEME.match(url):
        raise ConfigurationError("DB_URL must look like postgresql://user:password@host:5432/database")
    return _SCHEME.sub(f"postgresql+{driver}://" if driver else "postgresql://", url)


def with_database(url: str, database: str) -> str:
    """Return ``url`` with another database name."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"/{quote(database, safe='')}"))


@overload
def connect(
    url: str, *, autocommit: bool = False, timeout: int = 10, cipher: None = None, source: str = DEFAULT_SOURCE
) -> Connection: ...


@overload
def connect(
    url: str, *, autocommit: bool = False, timeout: int = 10, cipher: Cipher, source: str = DEFAULT_SOURCE
) -> Session: ...


def connect(
    url: str,
    *,
    autocommit: bool = False,
    timeout: int = 10,
    cipher: Cipher | None = None,
    source: str = DEFAULT_SOURCE,
) -> Connection | Session:
    """Open a connection with the time zone UTC: a ``Session`` if ``cipher`` is given, else a plain connection.

    Rows that it inserts belong to ``source``, and ``ops.current_source()`` returns it in SQL.

    ``timeout`` is in seconds. Raises DatabaseUnavailable if the server cannot be reached, and ConfigurationError if it
    refuses the connection (password, rights, a missing database), is older than ``OLDEST_SERVER`` or has another
    encoding than UTF8. Neither message contains the password.
    """
    kind: type[Connection] = psycopg.Connection if cipher is None else Session
    try:
        connection = kind.connect(
            normalise_url(url), autocommit=autocommit, connect_timeout=timeout, **_build_options(source)
        )
    except psycopg.OperationalError as error:
        raise _explain(url, error) from None
    except psycopg.Error:
        raise ConfigurationError(f"DB_URL cannot be parsed: {_describe(url)}") from None
    try:
        _check_server(connection, url)
    except ConfigurationError:
        connection.close()
        raise
    if cipher is not None:
        assert isinstance(connection, Session)
        connection.cipher = cipher
        connection.source = source
    return connection


def _check_server(connection: Connection, url: str) -> None:
    """Raise ConfigurationError if the server is too old or its database has another encoding than UTF8.

    The server sends both when a connection is opened.
    """
    version = connection.info.server_version // 10_000
    if version < OLDEST_SERVER:
        raise ConfigurationError(
            f"Postgres {version} at {_describe(url)} is too old: {OLDEST_SERVER} or newer is required"
        )
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise ConfigurationError(
            f"The database {_describe(url)} has the encoding {encoding}, which cannot hold every text of FHIR: create "
            "another with `CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0`, and name it in DB_URL"
        )


def require_session(connection: Connection, url: str) -> None:
    """Check that the connection is a session of Postgres, with the settings that ``connect`` gave it.

    Raises ConfigurationError if a pooler such as PgBouncer is between, which hands the sessions of Postgres from
    transaction to transaction: locks, notifications and settings of a session would be lost.
    """
    row = connection.execute("SELECT current_setting('fhir_assets.source', true)").fetchone()
    if row is None or not row[0]:
        raise ConfigurationError(_describe_pooler(url))


def _describe_pooler(url: str) -> str:
    return (
        f"A pooler such as PgBouncer answers at {_describe(url)} and drops the settings of sessions. The locks, "
        "notifications and settings of a session are needed: let DB_URL name Postgres itself, not the pooler"
    )


@contextmanager
def borrow_session(
    url: str,
    *,
    cipher: Cipher,
    source: str = DEFAULT_SOURCE,
    on_audit: Callable[[int], None] | None = None,
) -> Iterator[Session]:
    """Return a session for a ``with`` block: an idle connection of this process, or a new one.

    At the end of the block the transaction is committed, or rolled back after an error, and the connection is returned
    to the cache of the process. Raises as ``connect`` does.
    """
    key = f"{source} {url}"
    session = CONNECTION_CACHE.take(key) or connect(url, cipher=cipher, source=source)
    assert isinstance(session, Session)
    session.cipher = cipher
    session.on_audit = on_audit
    # Prepared statements are dropped at the end of the block, and few blocks repeat a statement often enough to profit.
    session.prepare_threshold = None
    try:
        yield session
        if not session.closed:
            session.commit()
    finally:
        CONNECTION_CACHE.put(key, session)


def connection_pool(
    url: str,
    *,
    cipher: Cipher,
    size: int = 8,
    source: str = DEFAULT_SOURCE,
    on_audit: Callable[[int], None] | None = None,
) -> ConnectionPool[Session]:
    """Return a pool of up to ``size`` sessions for a process that serves many short requests. It is not yet open."""

    def set_cipher(session: Session) -> None:
        session.cipher = cipher
        session.source = source
        session.on_audit = on_audit

    return ConnectionPool(
        normalise_url(url),
        connection_class=Session,
        kwargs={"connect_timeout": 10, **_build_options(source)},
        min_size=1,
        max_size=size,
        timeout=10,
        max_idle=60,
        # By default the pool retries with growing waits, so that it may stay unusable long after the database is
        # available.
        reconnect_timeout=2,
        configure=set_cipher,
        check=ConnectionPool.check_connection,
        open=False,
    )


def cipher_of(conn: Connection) -> Cipher:
    """Return the cipher of a session. Raises MissingCipher for a connection that was opened without one."""
    if not isinstance(conn, Session):
        raise MissingCipher("this connection has no cipher: open it through Warehouse.connect")
    return conn.cipher


def is_alive(conn: Connection) -> bool:
    """Return True if Postgres answers a query. Raises psycopg.OperationalError if the connection is lost."""
    return conn.execute("SELECT 1").fetchone() is not None


def ensure_database(url: str, name: str) -> None:
    """Create the database ``name`` on the server of ``url`` unless it exists.

    Raises DatabaseUnavailable, or ConfigurationError if the user lacks the right.
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
                f"The login {conn.info.user} of DB_URL may not create the database {name} at {_describe(url)}: "
                f"have an administrator run `CREATE DATABASE {name}`"
            ) from None


def repeat_after_deadlock(transaction: Callable[[], T], name: str) -> T:
    """Call a function that executes one transaction, again if Postgres cancelled it because of a deadlock.

    ``name`` says what it does, for the message of the DatabaseUnavailable that is raised after the third deadlock.
    """
    for _ in range(_ATTEMPTS):
        try:
            return transaction()
        except psycopg.errors.DeadlockDetected:
            continue
        except psycopg.errors.InternalError_ as error:
            # Another session granted rights on the same object at the same time.
            if "concurrently updated" not in str(error):
                raise
            time.sleep(random.uniform(0.1, _CONCURRENT_UPDATE_SECONDS))
    raise DatabaseUnavailable(
        f"Postgres cancelled {name} {_ATTEMPTS} times, because of deadlocks with other sessions. Nothing was changed: "
        "run it again"
    )


def _build_options(source: str) -> dict[str, Any]:
    options = f"-c TimeZone=UTC -c DateStyle=ISO -c fhir_assets.source={require_source_key(source)}"
    return {
        "application_name": "fhir_assets",
        "options": options,
        "context": time_loaders.CONTEXT,
        "cursor_factory": _Cursor,
        # PGCLIENTENCODING of the environment must not change how texts are sent.
        "client_encoding": "UTF8",
    }


def _explain(url: str, error: psycopg.OperationalError) -> ConfigurationError | DatabaseUnavailable:
    text = str(error)
    for fragment, reason in _HINTS:
        if fragment in text:
            return ConfigurationError(f"Postgres at {_describe(url)} refused the connection: {reason}")
    if "unsupported startup parameter" in text:
        return ConfigurationError(_describe_pooler(url))
    reason = text.strip().splitlines()[-1].strip() if text.strip() else type(error).__name__
    password = urlsplit(url).password
    if password:
        reason = reason.replace(password, "***")
    return DatabaseUnavailable(
        f"Postgres at {_describe(url)} cannot be reached ({reason}): start it, or correct DB_URL, then try again"
    )


def _describe(url: str) -> str:
    """Return host, port and database of a URL, without user and password."""
    try:
        info = psycopg.conninfo.conninfo_to_dict(normalise_url(url))
    except (psycopg.Error, ConfigurationError):
        return "the address in DB_URL"
    return f"{info.get('host') or 'localhost'}:{info.get('port') or 5432}/{info.get('dbname') or ''}"
