"""Migrations of the schema: Alembic revisions in ``sql/migrations``, and a partition of fhir.resource for each type."""

import itertools
import time

import psycopg
import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from psycopg import sql
from sqlalchemy.pool import NullPool

from fhir_assets.catalog import CATALOG
from fhir_assets.errors import ConfigurationError, DatabaseUnavailable
from fhir_assets.retries import RetryPolicy
from fhir_assets.warehouse.postgres.db import advisory_locks, migration_checksums, roles
from fhir_assets.warehouse.postgres.db.connections import Connection, normalise_url, repeat_after_deadlock
from fhir_assets.warehouse.postgres.db.resource_partitions import partition_of
from fhir_assets.warehouse.postgres.db.schema_repairs import find_repairs
from fhir_assets.warehouse.postgres.db.schema_state import (
    build_newer_error,
    is_current,
    list_missing_partitions,
    read_scripts,
    sql_folder,
)

_LOCK_SECONDS = 1.9
"""How long a statement waits for a lock before the upgrade gives way. That is longer than the deadlock_timeout, after
which a vacuum gives way."""

_PATIENCE = RetryPolicy(attempts=1, first_wait=1, max_wait=5, budget=300)
"""The waits between attempts, during which sessions that queue behind the upgrade go on."""


def upgrade(url: str) -> None:
    """Upgrade the database to the newest schema, in one transaction. Several processes may call this concurrently.

    A database that is current is not changed, so that a user without rights to the schema may call this too. An upgrade
    that other sessions keep from a lock is repeated for five minutes.

    Raises DatabaseUnavailable, or ConfigurationError if the user lacks a right, if the schema is newer than this
    version, or if the file of an applied migration was changed.
    """
    if is_current(url):
        return
    engine = sqlalchemy.create_engine(
        normalise_url(url, "psycopg"),
        poolclass=NullPool,
        connect_args={"client_encoding": "UTF8", "options": f"-c lock_timeout={_LOCK_SECONDS * 1000:.0f}"},
    )
    until = time.monotonic() + _PATIENCE.budget
    try:
        for attempt in itertools.count(1):
            try:
                repeat_after_deadlock(lambda: _upgrade(engine), "the upgrade of the schema")
                return
            except psycopg.errors.LockNotAvailable:
                if time.monotonic() > until:
                    raise DatabaseUnavailable(
                        "Other sessions have used the tables for minutes, and the upgrade needs them alone for a "
                        "moment. Nothing was changed: end them (pg_stat_activity lists them), or run it again later"
                    ) from None
                time.sleep(_PATIENCE.wait_seconds(attempt))
    finally:
        engine.dispose()


def _upgrade(engine: sqlalchemy.Engine) -> None:
    try:
        with engine.begin() as connection:
            driver = connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            # Other upgrades are waited for, however long they take.
            driver.execute("SET LOCAL lock_timeout = 0")
            driver.execute("SELECT pg_advisory_xact_lock(%s)", [advisory_locks.SCHEMA])
            driver.execute("SET LOCAL lock_timeout TO DEFAULT")
            driver.execute("CREATE SCHEMA IF NOT EXISTS ops")
            heads = _read_heads(connection)
            if heads - read_scripts().known:
                raise build_newer_error(heads)
            migration_checksums.require_unchanged(driver)
            for revision in heads:
                for statement in find_repairs(revision):
                    driver.execute(statement)
            config = _build_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            migration_checksums.record(driver)
            _create_partitions(driver)
            roles.grant_rights(driver)
    except (sqlalchemy.exc.DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
        if isinstance(cause, psycopg.errors.DeadlockDetected | psycopg.errors.LockNotAvailable):
            raise cause from None
        if isinstance(cause, psycopg.errors.InsufficientPrivilege):
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
