"""Dagster's Postgres storage with its connections kept open, and the events of a step written together.

dagster-postgres opens a connection for every event unless a webserver asks it not to, and writes each event by itself,
in up to a dozen round trips. A load of an empty window has a thousand of them: they were more than half of its time.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from threading import RLock, local
from time import monotonic
from typing import Self

import dagster as dg
import sqlalchemy
from dagster_postgres import DagsterPostgresStorage, PostgresEventLogStorage
from dagster_postgres.utils import DagsterPostgresException, get_token_provider_from_config, pg_url_from_config
from sqlalchemy.dialects import postgresql

from fhir_assets.orchestration.dagster_internals import (
    AssetCheckEvaluationPlanned,
    AssetCheckExecutionRecordStatus,
    ConfigurableClassData,
    PostgresStorageConfig,
    load_event_log_tables,
)
from fhir_assets.orchestration.instance.event_rows import Row, each_partition, key_text, rows_of

_TABLES = load_event_log_tables()

STATEMENT_TIMEOUT_MS = 600_000
RECYCLE_SECONDS = 1800
CONNECTIONS = 20

HELD_EVENTS = 200
HELD_SECONDS = 1.0
"""Events of a step wait until there are so many, or until the next one after so long; and never beyond its end."""

_BEGIN = dg.DagsterEventType.STEP_START
_END = frozenset(
    {
        dg.DagsterEventType.STEP_SUCCESS,
        dg.DagsterEventType.STEP_FAILURE,
        dg.DagsterEventType.STEP_SKIPPED,
        dg.DagsterEventType.STEP_UP_FOR_RETRY,
    }
)
_RUN_END = frozenset(
    {dg.DagsterEventType.RUN_SUCCESS, dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_CANCELED}
)
_ASSETS = frozenset(
    {
        dg.DagsterEventType.ASSET_MATERIALIZATION,
        dg.DagsterEventType.ASSET_OBSERVATION,
        dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    }
)
_PLANNED_CHECK = dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED
_CHECK = dg.DagsterEventType.ASSET_CHECK_EVALUATION
_TOGETHER = _ASSETS | {_PLANNED_CHECK, _CHECK}

_INSERTED = ("run_id", "text", "dagster_event_type", "timestamp", "step_key", "asset_key", "partition")
_INSERT = sqlalchemy.text(
    "INSERT INTO event_logs (run_id, event, dagster_event_type, timestamp, step_key, asset_key, partition)"
    " SELECT run_id, event, kind, at, step_key, asset_key, partition"
    " FROM unnest(CAST(:run_id AS text[]), CAST(:text AS text[]), CAST(:dagster_event_type AS text[]),"
    " CAST(:timestamp AS timestamp[]), CAST(:step_key AS text[]), CAST(:asset_key AS text[]),"
    " CAST(:partition AS text[])) WITH ORDINALITY"
    " AS n (run_id, event, kind, at, step_key, asset_key, partition, place) ORDER BY place RETURNING id"
)

_INSERT_TAGS = sqlalchemy.text(
    "INSERT INTO asset_event_tags (event_id, asset_key, key, value, event_timestamp)"
    " SELECT * FROM unnest(CAST(:event_id AS bigint[]), CAST(:asset_key AS text[]), CAST(:key AS text[]),"
    " CAST(:value AS text[]), CAST(:at AS timestamp[]))"
)

_UPDATE_CHECKS = sqlalchemy.text(
    "UPDATE asset_check_executions c SET execution_status = n.status, evaluation_event = n.event,"
    " evaluation_event_timestamp = n.at, evaluation_event_storage_id = n.id,"
    " materialization_event_storage_id = n.target"
    " FROM unnest(CAST(:asset_key AS text[]), CAST(:check_name AS text[]), CAST(:run_id AS text[]),"
    " CAST(:partition AS text[]), CAST(:status AS text[]), CAST(:event AS text[]), CAST(:at AS timestamp[]),"
    " CAST(:id AS bigint[]), CAST(:target AS bigint[]))"
    " AS n (asset_key, check_name, run_id, partition, status, event, at, id, target)"
    " WHERE c.asset_key = n.asset_key AND c.check_name = n.check_name AND c.run_id = n.run_id"
    " AND (c.partition = n.partition OR c.partition IS NULL AND n.partition IS NULL) RETURNING n.id"
)

_AWAY = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, DagsterPostgresException)
"""The database cannot be reached: what waits goes on waiting."""


class BatchedEventLog(PostgresEventLogStorage):
    """dagster-postgres' event log. What a step tells between its start and its end is written in one transaction, at
    its end or after a second. All that is read through this object, and all other events, come after what waits.

    Of a process that is killed the last second of events can be missing, as if it had been killed that much earlier:
    a step that ended, or failed, has all of them.
    """

    def __init__(self, *arguments: object, **options: object) -> None:
        self._there: set[str] = set()
        self._columns: set[str] = set()
        self._held: list[dg.EventLogEntry] = []
        self._since = 0.0
        self._open: set[tuple[str, str]] = set()
        self._writing = RLock()
        self._mine = local()
        super().__init__(*arguments, **options)  # type: ignore[arg-type]

    def has_table(self, table_name: str) -> bool:
        """Whether the storage has a table; one that was there stays."""
        if table_name not in self._there and super().has_table(table_name):
            self._there.add(table_name)
        return table_name in self._there

    def has_asset_key_col(self, column_name: str) -> bool:
        """Whether the table of assets has a column; one that was there stays."""
        if column_name not in self._columns and super().has_asset_key_col(column_name):
            self._columns.add(column_name)
        return column_name in self._columns

    @property
    def supports_partition_subset_in_asset_materialization_planned_events(self) -> bool:
        """Dagster plans a range with an event an asset; each of its partitions gets its row here, as it would have."""
        return True

    def store_event(self, event: dg.EventLogEntry) -> None:
        """The event gets its row: at once, or with those of its step."""
        kind = event.dagster_event_type
        step = (event.run_id, (event.dagster_event.step_key if event.dagster_event else event.step_key) or "")
        with self._writing:
            if kind is _BEGIN:
                self._open.add(step)
                self._write([event])
            elif step not in self._open:
                if kind in _RUN_END:
                    self._open = {each for each in self._open if each[0] != event.run_id}
                self._write([event])
            elif kind in _END:
                self._open.discard(step)
                self._write([event])
            else:
                self._hold([event])

    def store_event_batch(self, events: Sequence[dg.EventLogEntry]) -> None:
        """Every event of the batch gets its row, as if each were stored by itself."""
        if not {event.dagster_event_type for event in events} <= _TOGETHER:
            super().store_event_batch(_each(events))
            return
        with self._writing:
            steps = {(event.run_id, event.get_dagster_event().step_key or "") for event in events}
            if steps <= self._open:
                self._hold(events)
            else:
                self._write(events)

    def flush(self) -> None:
        """Write what waits."""
        with self._writing:
            if self._held:
                self._write([])

    def dispose(self) -> None:
        """Write what waits, if that can be, and let go."""
        with suppress(*_AWAY):
            self.flush()
        super().dispose()

    def _hold(self, events: Sequence[dg.EventLogEntry]) -> None:
        if not self._held:
            self._since = monotonic()
        self._held += events
        if len(self._held) >= HELD_EVENTS or monotonic() - self._since > HELD_SECONDS:
            self._write([])

    def _write(self, events: Sequence[dg.EventLogEntry]) -> None:
        """Write what waits, then the events."""
        held, self._held = self._held, []
        try:
            self._write_together([*held, *events])
        except _AWAY:
            self._held = held
            raise
        except Exception:
            self._write_each([*held, *events])

    def _write_each(self, events: Sequence[dg.EventLogEntry]) -> None:
        """One that cannot be stored takes none with it. Raises what the first such raised."""
        first: Exception | None = None
        for event in _each(events):
            try:
                super().store_event(event)
            except Exception as error:
                first = first or error
        if first:
            raise first

    def _write_together(self, events: Sequence[dg.EventLogEntry]) -> None:
        rows = rows_of(events)
        with self._transaction() as conn:
            ids = conn.execute(_INSERT, {name: [getattr(row, name) for row in rows] for name in _INSERTED}).scalars()
            for row, storage_id in zip(rows, sorted(ids), strict=True):
                row.id = storage_id
            if of_assets := [row for row in rows if row.kind in _ASSETS and row.asset_key]:
                self._store_tags(conn, of_assets)
                self._store_assets(conn, of_assets)
            if planned := [row for row in rows if row.kind is _PLANNED_CHECK]:
                self._store_planned_checks(conn, planned)
            if checks := [row for row in rows if row.kind is _CHECK]:
                self._store_evaluations(conn, checks)

    def _store_tags(self, conn: sqlalchemy.Connection, rows: Sequence[Row]) -> None:
        """Of the events' tags those that Dagster looks assets up by."""
        tagged = [
            {"event_id": row.id, "asset_key": row.asset_key, "key": key, "value": tags[key], "at": row.timestamp}
            for row in rows
            if (tags := row.tags)
            for key in self.get_asset_tags_to_index(set(tags))
        ]
        if tagged and self.has_table(_TABLES.event_tags.name):
            conn.execute(_INSERT_TAGS, {name: [each[name] for each in tagged] for name in tagged[0]})

    def _store_assets(self, conn: sqlalchemy.Connection, rows: Sequence[Row]) -> None:
        """Each asset's row says what its newest event of a kind says."""
        indexed = self.has_secondary_index(_TABLES.asset_key_index)
        by_kind: dict[dg.DagsterEventType | None, dict[str, Row]] = {}
        for row in rows:
            by_kind.setdefault(row.kind, {})[row.asset_key or ""] = row
        for newest in by_kind.values():
            # In one order everywhere, so that two runs do not wait for each other crosswise.
            values = [
                {"asset_key": key, **self._get_asset_entry_values(newest[key].event, newest[key].id, indexed)}
                for key in sorted(newest)
            ]
            query = postgresql.insert(_TABLES.asset_keys).values(values)
            changed = {name: query.excluded[name] for name in values[0] if name != "asset_key"}
            conn.execute(
                query.on_conflict_do_update(index_elements=[_TABLES.asset_keys.c.asset_key], set_=changed)
                if changed
                else query.on_conflict_do_nothing()
            )

    def _store_planned_checks(self, conn: sqlalchemy.Connection, rows: Sequence[Row]) -> None:
        values = [
            {
                "asset_key": key_text(planned.asset_key),
                "check_name": planned.check_name,
                "partition": partition,
                "run_id": row.event.run_id,
                "execution_status": AssetCheckExecutionRecordStatus.PLANNED.value,
                "evaluation_event": row.text,
                "evaluation_event_timestamp": row.timestamp,
                "evaluation_event_storage_id": row.id,
            }
            for row in rows
            if isinstance(planned := row.event.get_dagster_event().event_specific_data, AssetCheckEvaluationPlanned)
            for partition in (planned.partitions_subset.get_partition_keys() if planned.partitions_subset else [None])
        ]
        conn.execute(_TABLES.check_executions.insert(), values)

    def _store_evaluations(self, conn: sqlalchemy.Connection, rows: Sequence[Row]) -> None:
        """Each takes the place of what was planned; one that was not is new, as dagster has it."""
        values = [
            {
                "asset_key": key_text(evaluation.asset_key),
                "check_name": evaluation.check_name,
                "run_id": row.event.run_id,
                "partition": evaluation.partition,
                "status": _status(evaluation).value,
                "event": row.text,
                "at": row.timestamp,
                "id": row.id,
                "target": target.storage_id if (target := evaluation.target_materialization_data) else None,
            }
            for row in rows
            if row.event.run_id
            and isinstance(evaluation := row.event.get_dagster_event().event_specific_data, dg.AssetCheckEvaluation)
        ]
        planned: set[int] = set()
        if values:
            planned.update(
                conn.execute(_UPDATE_CHECKS, {name: [each[name] for each in values] for name in values[0]}).scalars()
            )
        for row in rows:
            if row.id not in planned:
                self.store_asset_check_event(row.event, row.id)

    @contextmanager
    def _transaction(self) -> Iterator[sqlalchemy.Connection]:
        """A transaction that also the inherited methods work in, meanwhile and in this thread."""
        with super()._connect() as conn:
            # Said by hand: the connection is in autocommit, and to switch costs more than a transaction.
            conn.exec_driver_sql("BEGIN")
            self._mine.connection = conn
            try:
                yield conn
            except BaseException:
                with suppress(sqlalchemy.exc.SQLAlchemyError):
                    conn.exec_driver_sql("ROLLBACK")
                raise
            else:
                conn.exec_driver_sql("COMMIT")
            finally:
                self._mine.connection = None

    def _connect(self) -> AbstractContextManager[sqlalchemy.Connection]:
        mine: sqlalchemy.Connection | None = getattr(self._mine, "connection", None)
        if mine is not None:
            return nullcontext(mine)
        self.flush()
        return super()._connect()


def _each(events: Sequence[dg.EventLogEntry]) -> list[dg.EventLogEntry]:
    return list(chain.from_iterable(map(each_partition, events)))


def _status(evaluation: dg.AssetCheckEvaluation) -> AssetCheckExecutionRecordStatus:
    if evaluation.passed:
        return AssetCheckExecutionRecordStatus.SUCCEEDED
    return AssetCheckExecutionRecordStatus.FAILED


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
