"""Dagster's Postgres storage with its connections kept open.

dagster-postgres opens a connection for every event unless a webserver asks it not to; a load of many windows writes
thousands of events, and connecting was a third of its time.
"""

from typing import Self

from dagster._core.storage.config import PostgresStorageConfig
from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage
from dagster_postgres.utils import get_token_provider_from_config, pg_url_from_config

STATEMENT_TIMEOUT_MS = 600_000
RECYCLE_SECONDS = 1800
CONNECTIONS = 20


class PooledPostgresStorage(DagsterPostgresStorage):
    """Configured as ``storage: custom:`` in dagster.yaml; everything but the pool is dagster-postgres' own."""

    @classmethod
    def from_config_value(  # type: ignore[override]  # as dagster-postgres has it
        cls, inst_data: ConfigurableClassData | None, config_value: PostgresStorageConfig
    ) -> Self:
        """What Dagster calls with the ``config`` of dagster.yaml."""
        storage = cls(
            inst_data=inst_data,
            postgres_url=pg_url_from_config(config_value),
            should_autocreate_tables=bool(config_value.get("should_autocreate_tables", True)),
            token_provider=get_token_provider_from_config(config_value),
        )
        for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
            part.optimize_for_webserver(STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS, CONNECTIONS)
        return storage
