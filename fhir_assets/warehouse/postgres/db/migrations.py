"""Migrations of the schema: Alembic revisions in ``sql/migrations``, and a partition of fhir.resource for each type."""

from collections.abc import Iterable
from pathlib import Path

import psycopg
import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy.pool import NullPool

from fhir_assets.catalog import CATALOG
from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db import advisory_locks, roles
from fhir_assets.warehouse.postgres.db.connections import Connection, connect, normalise_url


def sql_folder() -> Path:
    """Return the folder ``sql/`` of the checkout, or its copy inside the installed package.

    Raises ConfigurationError if neither exists.
    """
    package = Path(__file__).resolve().parents[3]
    for folder in (package / "sql", package.parent / "sql"):
        if (folder / "migrations" / "env.py").is_file():
            return folder
    raise ConfigurationError(f"The folder sql/ is missing beside or inside {package}: install fhir-assets again")


def upgrade(url: str) -> None:
    """Upgrade the database to the newest schema, in one transaction.

    Several processes may call this at once. A database that is current is not changed, so that a user without rights to
    the schema may call this too. Raises DatabaseUnavailable, or ConfigurationError if the user lacks a right or the
    schema is newer than this version.
    """
    if is_current(url):
        return
    engine = sqlalchemy.create_engine(normalise_url(url, "psycopg"), poolclass=NullPool)
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": advisory_locks.SCHEMA})
            connection.execute(sqlalchemy.text("CREATE SCHEMA IF NOT EXISTS ops"))
            heads = _read_heads(connection)
            if heads - _known_revisions():
                raise _build_newer_error(heads)
            config = _build_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            driver = connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            _create_partitions(driver)
            roles.grant_rights(driver)
    except sqlalchemy.exc.ProgrammingError as error:
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise ConfigurationError(
                "The database user may not create schemas and tables: grant CREATE on the database to the user of "
                "DB_URL, or run `fhir-assets migrate` as the user that owns them"
            ) from None
        raise
    finally:
        engine.dispose()


def require_current(url: str) -> None:
    """Check that the database has the schema of this version, and change nothing.

    Raises ConfigurationError if the schema is missing, older or newer, or if the user may not read its revision, and
    DatabaseUnavailable.
    """
    with connect(url) as conn:
        revision, missing = _read_state(conn)
    needed = _load_scripts().get_current_head()
    if revision is None:
        raise ConfigurationError("The database has no schema yet: run `fhir-assets migrate`")
    if revision not in _known_revisions():
        raise _build_newer_error([revision])
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
        revision, missing = _read_state(conn)
    return revision == _load_scripts().get_current_head() and not missing


def lock_schema(conn: Connection) -> None:
    """Wait for the lock on changes of the schema, and hold it until the end of the transaction."""
    conn.execute("SELECT pg_advisory_xact_lock(%s)", [advisory_locks.SCHEMA])


def _build_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(sql_folder() / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _load_scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_build_config())


def _known_revisions() -> set[str]:
    return {script.revision for script in _load_scripts().walk_revisions()}


def _build_newer_error(revisions: Iterable[str]) -> ConfigurationError:
    return ConfigurationError(
        f"The database's schema ({', '.join(sorted(revisions))}) is newer than this installation: upgrade fhir-assets"
    )


def _read_heads(connection: sqlalchemy.Connection) -> set[str]:
    context = MigrationContext.configure(connection, opts={"version_table_schema": "ops"})
    return set(context.get_current_heads())


def _read_state(conn: Connection) -> tuple[str | None, list[str]]:
    """Return the revision and the resource types whose partition is missing."""
    try:
        revision = _query_revision(conn)
        return revision, _list_missing_partitions(conn) if revision else []
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigurationError(
            "The user of DB_URL has no rights to schema ops: grant it the role fhir_loader, or fhir_operator"
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


def _list_missing_partitions(conn: Connection) -> list[str]:
    # A database at an early revision has no schema fhir; to_regnamespace then returns NULL and no row matches.
    rows = conn.execute(
        """
        SELECT relname
        FROM pg_class
        WHERE relnamespace = to_regnamespace('fhir')
        """
    )
    tables = {name for (name,) in rows}
    return [resource_type.name for resource_type in CATALOG if f"resource_{resource_type.key}" not in tables]


def _create_partitions(conn: Connection) -> None:
    missing = set(_list_missing_partitions(conn))
    for resource_type in CATALOG:
        if resource_type.name in missing:
            conn.execute(
                sql.SQL("""
                    CREATE TABLE {}
                    PARTITION OF fhir.resource
                    FOR VALUES IN ({})
                """).format(sql.Identifier("fhir", f"resource_{resource_type.key}"), sql.Literal(resource_type.name))
            )
