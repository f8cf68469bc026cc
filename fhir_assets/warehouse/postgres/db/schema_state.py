"""The state of a database's schema, compared with the revision of this version, without Alembic.

Every command checks it before it opens the database, and importing Alembic and SQLAlchemy takes longer than most
commands: only an upgrade, in ``migrations``, needs them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psycopg

from fhir_assets.catalog import CATALOG
from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db import advisory_locks, resource_partitions
from fhir_assets.warehouse.postgres.db.connections import Connection, connect, require_session

_REVISION = re.compile(r"""^revision(?:: str)? = ["'](\w+)["']""", re.MULTILINE)
_DOWN_REVISION = re.compile(r"""^down_revision(?:: [\w |]+)? = ["'](\w+)["']""", re.MULTILINE)


@dataclass(frozen=True)
class MigrationScripts:
    """The revisions of the migrations of this version, and the newest of them."""

    known: frozenset[str]
    head: str


def sql_folder() -> Path:
    """Return the folder ``sql/`` of the checkout, or its copy inside the installed package.

    Raises ConfigurationError if neither exists.
    """
    package = Path(__file__).resolve().parents[3]
    for folder in (package / "sql", package.parent / "sql"):
        if (folder / "migrations" / "env.py").is_file():
            return folder
    raise ConfigurationError(f"The folder sql/ is missing next to or inside {package}: install fhir-assets again")


@cache
def read_migration_files() -> Mapping[str, str]:
    """Return the texts of the files of ``sql/migrations/versions`` by revision. Raises as ``sql_folder``."""
    texts = [path.read_text() for path in (sql_folder() / "migrations" / "versions").glob("*.py")]
    return {found[1]: text for text in texts if (found := _REVISION.search(text))}


@cache
def read_scripts() -> MigrationScripts:
    """Return the revisions of the files of ``sql/migrations/versions``. Raises ConfigurationError as ``sql_folder``."""
    files = read_migration_files()
    known = frozenset(files)
    (head,) = known - {found[1] for text in files.values() if (found := _DOWN_REVISION.search(text))}
    return MigrationScripts(known, head)


def require_current(url: str) -> None:
    """Check that the database has the schema of this version, and change nothing.

    Raises ConfigurationError if the schema is missing, older or newer, or if the user may not read its revision, and
    DatabaseUnavailable.
    """
    with connect(url) as conn:
        require_session(conn, url)
        revision, missing = _read_state(conn)
    needed = read_scripts().head
    if revision is None:
        raise ConfigurationError("The database has no schema yet: run `fhir-assets migrate`")
    if revision not in read_scripts().known:
        raise build_newer_error([revision])
    if revision != needed:
        raise ConfigurationError(
            f"The database's schema is at revision {revision}, this version needs {needed}: run `fhir-assets migrate`"
        )
    if missing:
        raise ConfigurationError(
            f"The database has no partition of fhir.resource for {', '.join(missing)}: run `fhir-assets migrate`"
        )


def read_revision(url: str) -> str | None:
    """Return the revision of the database's schema, or None before the first migration."""
    with connect(url) as conn:
        return _query_revision(conn)


def is_current(url: str) -> bool:
    """Return whether ``upgrade`` has nothing to do. Raises ConfigurationError if the user may not read the revision."""
    with connect(url) as conn:
        require_session(conn, url)
        revision, missing = _read_state(conn)
    return revision == read_scripts().head and not missing


def lock_schema(conn: Connection) -> None:
    """Wait for the lock on changes of the schema, and hold it until the end of the transaction."""
    conn.execute("SELECT pg_advisory_xact_lock(%s)", [advisory_locks.SCHEMA])


def build_newer_error(revisions: Iterable[str]) -> ConfigurationError:
    """Return the error for a schema that is newer than this version."""
    return ConfigurationError(
        f"The database's schema ({', '.join(sorted(revisions))}) is newer than this installation: upgrade fhir-assets"
    )


def _read_state(conn: Connection) -> tuple[str | None, list[str]]:
    """Return the revision and the resource types whose partition is missing."""
    try:
        revision = _query_revision(conn)
        return revision, list_missing_partitions(conn) if revision else []
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigurationError(
            f"The login {conn.info.user} of DB_URL has no rights to schema ops: run the process with the login that is "
            "made for it, or grant it the role fhir_loader, or that of the process (`fhir-assets roles` lists them)"
        ) from None


def _query_revision(conn: Connection) -> str | None:
    table = conn.execute("SELECT to_regclass('ops.alembic_version')").fetchone()
    if table is None or table[0] is None:
        return None
    row = conn.execute(
        """
        SELECT version_num
        FROM ops.alembic_version
        """
    ).fetchone()
    return str(row[0]) if row else None


def list_missing_partitions(conn: Connection) -> list[str]:
    """Return the resource types of the catalog that have no partition of fhir.resource."""
    # A database at an earlier revision lacks the schema; to_regnamespace then returns NULL and no row matches.
    rows = conn.execute(
        """
        SELECT relname
        FROM pg_class
        WHERE relnamespace = to_regnamespace(%s)
        """,
        [resource_partitions.SCHEMA],
    )
    tables = {name for (name,) in rows}
    names = [resource_type.name for resource_type in CATALOG]
    return [name for name in names if resource_partitions.partition_name(name) not in tables]
