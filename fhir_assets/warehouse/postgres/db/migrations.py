"""The schema's migrations: Alembic, from ``sql/migrations``, plus one partition of fhir.resource a catalog type."""

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
    """``sql/`` of the checkout, or its copy inside the installed package."""
    package = Path(__file__).resolve().parents[3]
    for folder in (package / "sql", package.parent / "sql"):
        if (folder / "migrations" / "env.py").is_file():
            return folder
    raise ConfigurationError(f"The folder sql/ is missing beside or inside {package}: install fhir-assets again")


def upgrade(url: str) -> None:
    """Bring the database to the newest schema, in one transaction. Several processes may do so at once; where there
    is nothing to do, those may too that have no rights to.

    Raises DatabaseUnavailable, or ConfigurationError if the user lacks a right or the schema is newer than this code.
    """
    if is_current(url):
        return
    engine = sqlalchemy.create_engine(normalise_url(url, "psycopg"), poolclass=NullPool)
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": advisory_locks.SCHEMA})
            connection.execute(sqlalchemy.text("CREATE SCHEMA IF NOT EXISTS ops"))
            known = {script.revision for script in _scripts().walk_revisions()}
            heads = _heads(connection)
            if heads - known:
                raise ConfigurationError(
                    f"The database's schema ({', '.join(sorted(heads))}) is newer than this installation: "
                    "upgrade fhir-assets"
                )
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            driver = connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            _create_partitions(driver)
            roles.grant(driver)
    except sqlalchemy.exc.ProgrammingError as error:
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise ConfigurationError(
                "The database user may not create schemas and tables: grant CREATE on the database to the user of "
                "DB_URL, or run `fhir-assets migrate` as the user that owns them"
            ) from None
        raise
    finally:
        engine.dispose()


def current(url: str) -> str | None:
    """The revision that the database is at; None before the first migration."""
    with connect(url) as conn:
        return _revision(conn)


def is_current(url: str) -> bool:
    """Whether ``upgrade`` has nothing to do. Raises ConfigurationError if the user may not even look."""
    with connect(url) as conn:
        try:
            return _revision(conn) == _scripts().get_current_head() and not _missing_partitions(conn)
        except psycopg.errors.InsufficientPrivilege:
            raise ConfigurationError(
                "The user of DB_URL has no rights to schema ops: grant it the role fhir_loader, or fhir_operator"
            ) from None


def lock_schema(conn: Connection) -> None:
    """Wait for the right to change tables, until the transaction ends."""
    conn.execute("SELECT pg_advisory_xact_lock(%s)", [advisory_locks.SCHEMA])


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(sql_folder() / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _heads(connection: sqlalchemy.Connection) -> set[str]:
    context = MigrationContext.configure(connection, opts={"version_table_schema": "ops"})
    return set(context.get_current_heads())


def _revision(conn: Connection) -> str | None:
    there = conn.execute("SELECT to_regclass('ops.alembic_version')").fetchone()
    if there is None or there[0] is None:
        return None
    row = conn.execute("SELECT version_num FROM ops.alembic_version").fetchone()
    return str(row[0]) if row else None


def _missing_partitions(conn: Connection) -> list[str]:
    there = {row[0] for row in conn.execute("SELECT relname FROM pg_class WHERE relnamespace = 'fhir'::regnamespace")}
    return [t.name for t in CATALOG if f"resource_{t.key}" not in there]


def _create_partitions(conn: Connection) -> None:
    missing = set(_missing_partitions(conn))
    for resource_type in CATALOG:
        if resource_type.name in missing:
            conn.execute(
                sql.SQL("CREATE TABLE {} PARTITION OF fhir.resource FOR VALUES IN ({})").format(
                    sql.Identifier("fhir", f"resource_{resource_type.key}"), sql.Literal(resource_type.name)
                )
            )
