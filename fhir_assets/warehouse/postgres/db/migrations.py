"""Migrations of the schema: Alembic revisions in ``sql/migrations``, and a partition of fhir.resource for each type."""

import psycopg
import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from psycopg import sql
from sqlalchemy.pool import NullPool

from fhir_assets.catalog import CATALOG
from fhir_assets.errors import ConfigurationError, DatabaseUnavailable
from fhir_assets.warehouse.postgres.db import advisory_locks, roles
from fhir_assets.warehouse.postgres.db.connections import Connection, normalise_url, repeat_after_deadlock
from fhir_assets.warehouse.postgres.db.resource_partitions import partition_of
from fhir_assets.warehouse.postgres.db.schema_state import (
    build_newer_error,
    is_current,
    list_missing_partitions,
    read_scripts,
    sql_folder,
)


def upgrade(url: str) -> None:
    """Upgrade the database to the newest schema, in one transaction. Several processes may call this concurrently.

    A database that is current is not changed, so that a user without rights to the schema may call this too. Raises
    DatabaseUnavailable, or ConfigurationError if the user lacks a right or the schema is newer than this version.
    """
    if is_current(url):
        return
    engine = sqlalchemy.create_engine(normalise_url(url, "psycopg"), poolclass=NullPool)
    try:
        repeat_after_deadlock(lambda: _upgrade(engine), "the upgrade of the schema")
    finally:
        engine.dispose()


def _upgrade(engine: sqlalchemy.Engine) -> None:
    try:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": advisory_locks.SCHEMA})
            connection.execute(sqlalchemy.text("CREATE SCHEMA IF NOT EXISTS ops"))
            heads = _read_heads(connection)
            if heads - read_scripts().known:
                raise build_newer_error(heads)
            config = _build_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            driver = connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            _create_partitions(driver)
            roles.grant_rights(driver)
    except sqlalchemy.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.DeadlockDetected):
            raise error.orig from None
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            raise DatabaseUnavailable(
                "Other sessions have used fhir.resource for minutes, and the upgrade needs it alone for a moment. "
                "Nothing was changed: end them (pg_stat_activity lists them), or run it again later"
            ) from None
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise ConfigurationError(
                "The database user may not create schemas and tables: grant CREATE on the database to the user of "
                "DB_URL, or run `fhir-assets migrate` as the user that owns them"
            ) from None
        raise


def _build_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(sql_folder() / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _read_heads(connection: sqlalchemy.Connection) -> set[str]:
    context = MigrationContext.configure(connection, opts={"version_table_schema": "ops"})
    return set(context.get_current_heads())


def _create_partitions(conn: Connection) -> None:
    missing = set(list_missing_partitions(conn))
    for resource_type in CATALOG:
        if resource_type.name in missing:
            conn.execute(
                sql.SQL("""
                    CREATE TABLE {}
                    PARTITION OF fhir.resource
                    FOR VALUES IN ({})
                """).format(partition_of(resource_type.name), sql.Literal(resource_type.name))
            )
