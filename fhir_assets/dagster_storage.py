"""Dagster's Postgres storage with its connections kept open, and events of a range of windows written together.

dagster-postgres opens a connection for every event unless a webserver asks it not to, and writes planned events and
check evaluations one by one, each in several round trips. A load of a hundred windows has thousands of them: they
were four fifths of its time.
"""

from collections.abc import Sequence
from typing import Self

import dagster as dg
from dagster._core.events import DagsterEventType
from dagster._core.storage.config import PostgresStorageConfig
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable
from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage, PostgresEventLogStorage
from dagster_postgres.utils import get_token_provider_from_config, pg_url_from_config

STATEMENT_TIMEOUT_MS = 600_000
RECYCLE_SECONDS = 1800
CONNECTIONS = 20

_CHECKS = frozenset({DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED, DagsterEventType.ASSET_CHECK_EVALUATION})
_TOGETHER = _CHECKS | {DagsterEventType.ASSET_MATERIALIZATION_PLANNED}


class BatchedEventLog(PostgresEventLogStorage):
    """dagster-postgres' event log, which also takes planned events and check evaluations as a batch, and does not ask
    at every event whether its tables are there.
    """

    def has_table(self, table_name: str) -> bool:
        """Whether the storage has a table; one that was there stays."""
        there: set[str] = self.__dict__.setdefault("_tables_there", set())
        if table_name not in there and super().has_table(table_name):
            there.add(table_name)
        return table_name in there

    def store_event_batch(self, events: Sequence[dg.EventLogEntry]) -> None:
        """Every event of the batch gets its row, as if each were stored by itself."""
        if not {event.dagster_event_type for event in events} <= _TOGETHER:
            super().store_event_batch(events)
            return
        with self.index_transaction() as conn:
            inserted = conn.execute(self.prepare_insert_event_batch(events).returning(SqlEventLogStorageTable.c.id))
            stored = list(zip(events, (int(row[0]) for row in inserted.fetchall()), strict=True))
            newest = {event.get_dagster_event().asset_key: (event, number) for event, number in stored}
            for event, number in newest.values():
                if event.dagster_event_type is DagsterEventType.ASSET_MATERIALIZATION_PLANNED:
                    self._store_asset_event(conn, event, number)
        for event, number in stored:
            if event.dagster_event_type in _CHECKS:
                self.store_asset_check_event(event, number)


class PooledPostgresStorage(DagsterPostgresStorage):
    """Configured as ``storage: custom:`` in dagster.yaml; the rest is dagster-postgres' own."""

    @classmethod
    def from_config_value(  # type: ignore[override]  # as dagster-postgres has it
        cls, inst_data: ConfigurableClassData | None, config_value: PostgresStorageConfig
    ) -> Self:
        """What Dagster calls with the ``config`` of dagster.yaml."""
        token_provider = get_token_provider_from_config(config_value)
        storage = cls(
            inst_data=inst_data,
            postgres_url=pg_url_from_config(config_value),
            should_autocreate_tables=bool(config_value.get("should_autocreate_tables", True)),
            token_provider=token_provider,
        )
        storage._event_log_storage = BatchedEventLog(
            storage.postgres_url, storage.should_autocreate_tables, token_provider=token_provider
        )
        for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
            part.optimize_for_webserver(STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS, CONNECTIONS)
        return storage
