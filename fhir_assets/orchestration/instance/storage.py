"""Dagster's Postgres storage with connections that stay open, and an event log that writes events in batches.

dagster-postgres opens a connection for every event, except in a webserver, and writes each event separately, in up to a
dozen round trips. A load of an empty window has a thousand events; writing them takes more than half of its time.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from threading import RLock, local
from time import monotonic
from typing import Any, Self

import dagster as dg
import sqlalchemy
from dagster_postgres import DagsterPostgresStorage, PostgresEventLogStorage
from dagster_postgres.utils import DagsterPostgresException, get_token_provider_from_config, pg_url_from_config
from sqlalchemy.dialects import postgresql

from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.orchestration.dagster_internals import (
    AssetCheckEvaluationPlanned,
    AssetCheckExecutionRecordStatus,
    ConfigurableClassData,
    EventLogConnection,
    EventLogCursor,
    PostgresStorageConfig,
    StepMaterializationData,
    load_event_log_tables,
)
from fhir_assets.orchestration.instance.config import (
    CHECKED_DAGSTER_DATABASES,
    find_dagster_url,
    require_dagster_database,
)
from fhir_assets.orchestration.instance.event_rows import (
    Row,
    WindowMaterializations,
    build_rows,
    key_text,
    split_partitions,
)
from fhir_assets.orchestration.instance.run_page import omit_passed, read_events
from fhir_assets.orchestration.instance.runless_evaluations import build_runless_evaluation
from fhir_assets.settings import load_settings

_TABLES = load_event_log_tables()

STATEMENT_TIMEOUT_MS = 600_000
RECYCLE_SECONDS = 1800
CONNECTIONS = 20

MAX_HELD_EVENTS = 200
"""The number of events of running steps that wait in memory before they are written."""

MAX_HELD_SECONDS = 1.0
"""The age of the oldest waiting event at which the next event causes all of them to be written."""

_STEP_START = dg.DagsterEventType.STEP_START
_STEP_ENDS = frozenset(
    {
        dg.DagsterEventType.STEP_SUCCESS,
        dg.DagsterEventType.STEP_FAILURE,
        dg.DagsterEventType.STEP_SKIPPED,
        dg.DagsterEventType.STEP_UP_FOR_RETRY,
    }
)
_RUN_ENDS = frozenset(
    {dg.DagsterEventType.RUN_SUCCESS, dg.DagsterEventType.RUN_FAILURE, dg.DagsterEventType.RUN_CANCELED}
)
_ASSET_EVENTS = frozenset(
    {
        dg.DagsterEventType.ASSET_MATERIALIZATION,
        dg.DagsterEventType.ASSET_OBSERVATION,
        dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    }
)
_PLANNED_CHECK = dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED
_CHECK = dg.DagsterEventType.ASSET_CHECK_EVALUATION
_BATCHED_EVENTS = _ASSET_EVENTS | {_PLANNED_CHECK, _CHECK}

_INSERTED = ("run_id", "text", "dagster_event_type", "timestamp", "step_key", "asset_key", "partition")
_INSERT = sqlalchemy.text("""
    INSERT INTO event_logs (run_id, event, dagster_event_type, timestamp, step_key, asset_key, partition)
    SELECT run_id, event, event_type, timestamp, step_key, asset_key, partition
    FROM unnest(
        CAST(:run_id AS text[]),
        CAST(:text AS text[]),
        CAST(:dagster_event_type AS text[]),
        CAST(:timestamp AS timestamp[]),
        CAST(:step_key AS text[]),
        CAST(:asset_key AS text[]),
        CAST(:partition AS text[])
    ) WITH ORDINALITY AS new (run_id, event, event_type, timestamp, step_key, asset_key, partition, position)
    ORDER BY position
    RETURNING id
""")

_INSERT_TAGS = sqlalchemy.text("""
    INSERT INTO asset_event_tags (event_id, asset_key, key, value, event_timestamp)
    SELECT *
    FROM unnest(
        CAST(:event_id AS bigint[]),
        CAST(:asset_key AS text[]),
        CAST(:key AS text[]),
        CAST(:value AS text[]),
        CAST(:timestamp AS timestamp[])
    )
""")

_UPDATE_CHECKS = sqlalchemy.text("""
    UPDATE asset_check_executions planned
    SET execution_status = new.status,
        evaluation_event = new.event,
        evaluation_event_timestamp = new.timestamp,
        evaluation_event_storage_id = new.id,
        materialization_event_storage_id = new.target
    FROM unnest(
        CAST(:asset_key AS text[]),
        CAST(:check_name AS text[]),
        CAST(:run_id AS text[]),
        CAST(:partition AS text[]),
        CAST(:status AS text[]),
        CAST(:event AS text[]),
        CAST(:timestamp AS timestamp[]),
        CAST(:id AS bigint[]),
        CAST(:target AS bigint[])
    ) AS new (asset_key, check_name, run_id, partition, status, event, timestamp, id, target)
    WHERE planned.asset_key = new.asset_key
      AND planned.check_name = new.check_name
      AND planned.run_id = new.run_id
      AND (planned.partition = new.partition OR planned.partition IS NULL AND new.partition IS NULL)
    RETURNING new.id
""")

_UNREACHABLE = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, DagsterPostgresException)
"""Errors that mean that the database cannot be reached: the held events stay in memory."""

Entry = dg.EventLogEntry | WindowMaterializations
"""An event, or one that is stored as many."""

_log = logging.getLogger(__name__)


class BatchedEventLog(PostgresEventLogStorage):
    """dagster-postgres' event log, which writes the events between the start and the end of a step in one transaction.

    They are written at the end of the step, or after MAX_HELD_SECONDS. Every read through this object, and every other
    event, first writes the held events. A process that is killed may lose the last second of events of its running
    steps, as if it had been killed a second earlier; a step that ended or failed has all of its events.

    If a batch cannot be written, its events are written one by one as dagster-postgres does. A warning is logged the
    first time.
    """

    batches_evaluations = True
    """Whether evaluations of checks may be logged as a batch, which dagster-postgres' own event log refuses."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self._known_tables: set[str] = set()
        self._known_columns: set[str] = set()
        self._held: list[Entry] = []
        self._expanded: dict[tuple[str, str], Mapping[str, Mapping[str, Any]]] = {}
        self._held_since = 0.0
        self._open_steps: set[tuple[str, str]] = set()
        self._write_lock = RLock()
        self._thread = local()
        self._warned = False
        super().__init__(*arguments, **options)  # type: ignore[arg-type]

    def has_table(self, table_name: str) -> bool:
        """Return whether the storage has a table; a positive answer is remembered."""
        if table_name not in self._known_tables and super().has_table(table_name):
            self._known_tables.add(table_name)
        return table_name in self._known_tables

    def has_asset_key_col(self, column_name: str) -> bool:
        """Return whether the table of assets has a column; a positive answer is remembered."""
        if column_name not in self._known_columns and super().has_asset_key_col(column_name):
            self._known_columns.add(column_name)
        return column_name in self._known_columns

    @property
    def supports_partition_subset_in_asset_materialization_planned_events(self) -> bool:
        """Return True: Dagster then plans a range with one event for each asset.

        This storage writes a row for each partition of the event, as Dagster would have planned them one by one.
        """
        return True

    def expand_materialization(
        self, run_id: str, asset_key: dg.AssetKey, metadata_by_partition: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Store the next materialization of an asset in a run once for each partition, with the metadata of each."""
        with self._write_lock:
            self._expanded[run_id, key_text(asset_key)] = metadata_by_partition

    def store_event(self, event: dg.EventLogEntry) -> None:
        """Write an event immediately, or hold it until its step ends."""
        event_type = event.dagster_event_type
        step = (event.run_id, (event.dagster_event.step_key if event.dagster_event else event.step_key) or "")
        with self._write_lock:
            if event_type is _STEP_START:
                self._open_steps.add(step)
                self._write([event])
            elif step not in self._open_steps:
                if event_type in _RUN_ENDS:
                    self._open_steps = {open_step for open_step in self._open_steps if open_step[0] != event.run_id}
                self._write([self._expand(event)])
            elif event_type in _STEP_ENDS:
                self._open_steps.discard(step)
                self._write([event])
            else:
                self._hold([self._expand(event)])

    def _expand(self, event: dg.EventLogEntry) -> "Entry":
        """Return the event, or the materializations of many partitions if it stands for them."""
        data = event.dagster_event.event_specific_data if event.dagster_event and self._expanded else None
        if isinstance(data, StepMaterializationData):
            asset = key_text(data.materialization.asset_key)
            if metadata_by_partition := self._expanded.pop((event.run_id, asset), None):
                return WindowMaterializations(event, metadata_by_partition)
        return event

    def store_event_batch(self, events: Sequence[dg.EventLogEntry]) -> None:
        """Write or hold the events of a batch, as ``store_event`` does for each event."""
        if not {event.dagster_event_type for event in events} <= _BATCHED_EVENTS:
            super().store_event_batch(_split_partitions(events))
            return
        with self._write_lock:
            steps = {(event.run_id, event.get_dagster_event().step_key or "") for event in events}
            if steps <= self._open_steps:
                self._hold(events)
            else:
                self._write(events)

    def get_records_for_run(
        self,
        run_id: str,
        cursor: str | None = None,
        of_type: dg.DagsterEventType | set[dg.DagsterEventType] | None = None,
        limit: int | None = None,
        ascending: bool = True,
    ) -> EventLogConnection:
        """Return the events of a run, as the page of the run shows them.

        Unless ``of_type`` names types, what repeats for each window is left out, see ``run_page``. The pages of the
        assets and checks read it by its type.
        """
        position = EventLogCursor.parse(cursor) if cursor else None
        if of_type is not None or not ascending or (position and position.is_offset_cursor()):
            return super().get_records_for_run(run_id, cursor, of_type, limit, ascending)
        after = position.storage_id() if position else -1
        with self._connect() as conn:
            records = read_events(conn, run_id, after=after, limit=limit)
        last = records[-1].storage_id if records else after
        return EventLogConnection(
            list(omit_passed(records)),
            cursor=EventLogCursor.from_storage_id(last).to_string(),
            has_more=limit is not None and len(records) == limit,
        )

    def flush(self) -> None:
        """Write the held events."""
        with self._write_lock:
            if self._held:
                self._write([])

    def dispose(self) -> None:
        """Write the held events if the database can be reached, and close the connections."""
        with suppress(*_UNREACHABLE):
            self.flush()
        super().dispose()

    def _hold(self, events: "Sequence[Entry]") -> None:
        if not self._held:
            self._held_since = monotonic()
        self._held += events
        if len(self._held) >= MAX_HELD_EVENTS or monotonic() - self._held_since > MAX_HELD_SECONDS:
            self._write([])

    def _write(self, events: "Sequence[Entry]") -> None:
        """Write the held events, then ``events``."""
        held, self._held = self._held, []
        try:
            self._write_batch([*held, *events])
        except _UNREACHABLE:
            self._held = held
            raise
        except Exception as error:
            self._warn_once(error)
            self._write_one_by_one([*held, *events])

    def _warn_once(self, error: Exception) -> None:
        # The message of the error is left out, because it may quote an event.
        if not self._warned:
            self._warned = True
            _log.warning(
                "a batch of Dagster's events could not be written: they are written one by one, which is slower; "
                "further batches that fail are not logged",
                extra={"error": type(error).__name__},
            )

    def _write_one_by_one(self, events: "Sequence[Entry]") -> None:
        """Write each event in a transaction of its own, so that an event that fails does not affect the others.

        Raises the error of the first event that failed.
        """
        first_error: Exception | None = None
        for entry in events:
            try:
                single = split_partitions(entry)
            except Exception as error:  # Metadata that Dagster refuses.
                first_error = first_error or error
                continue
            for event in single:
                try:
                    super().store_event(event)
                except Exception as error:
                    first_error = first_error or error
        if first_error:
            raise first_error

    def _write_batch(self, events: "Sequence[Entry]") -> None:
        rows = build_rows(events)
        with self._transaction() as conn:
            ids = conn.execute(_INSERT, {name: [getattr(row, name) for row in rows] for name in _INSERTED}).scalars()
            for row, storage_id in zip(rows, sorted(ids), strict=True):
                row.id = storage_id
            if asset_rows := [row for row in rows if row.event_type in _ASSET_EVENTS and row.asset_key]:
                self._store_tags(conn, asset_rows)
                self._store_assets(conn, asset_rows)
            if planned := [row for row in rows if row.event_type is _PLANNED_CHECK]:
                self._store_planned_checks(conn, planned)
            if checks := [row for row in rows if row.event_type is _CHECK]:
                self._store_evaluations(conn, checks)

    def _store_tags(self, conn: sqlalchemy.Connection, rows: Sequence[Row]) -> None:
        """Store the tags of events that Dagster indexes for asset queries."""
        tagged = [
            {"event_id": row.id, "asset_key": row.asset_key, "key": key, "value": tags[key], "timestamp": row.timestamp}
            for row in rows
            if (tags := row.tags)
            for key in self.get_asset_tags_to_index(set(tags))
        ]
        if tagged and self.has_table(_TABLES.event_tags.name):
            conn.execute(_INSERT_TAGS, {name: [tag[name] for tag in tagged] for name in tagged[0]})

    def _store_assets(self, conn: sqlalchemy.Connection, rows: Sequence[Row]) -> None:
        """Update the row of each asset from the newest event of each type."""
        indexed = self.has_secondary_index(_TABLES.asset_key_index)
        by_type: dict[dg.DagsterEventType | None, dict[str, Row]] = {}
        for row in rows:
            by_type.setdefault(row.event_type, {})[row.asset_key or ""] = row
        for newest in by_type.values():
            # Sorted, so that two runs lock the rows in the same order and cannot deadlock.
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
        """Update the row of each planned check; evaluations that were not planned are stored by dagster-postgres."""
        values = [
            {
                "asset_key": key_text(evaluation.asset_key),
                "check_name": evaluation.check_name,
                "run_id": row.event.run_id,
                "partition": evaluation.partition,
                "status": _execution_status(evaluation).value,
                "event": row.text,
                "timestamp": row.timestamp,
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
                conn.execute(_UPDATE_CHECKS, {name: [value[name] for value in values] for name in values[0]}).scalars()
            )
        for row in rows:
            if row.id not in planned:
                self.store_asset_check_event(row.event, row.id)

    def _store_runless_asset_check_evaluation(self, event: dg.EventLogEntry, event_id: int | None) -> None:
        """Store an evaluation outside of a run. It replaces the previous one of the same check and partition.

        Dagster inserts a row for each, which the unique index refuses for the second evaluation of a partition.
        """
        with self.index_connection() as conn:
            timestamp = self._event_insert_timestamp(event)  # type: ignore[no-untyped-call]
            conn.execute(build_runless_evaluation(event, event_id, timestamp))

    @contextmanager
    def _transaction(self) -> Iterator[sqlalchemy.Connection]:
        """Open a transaction. Inherited methods that this thread calls in the block use its connection."""
        with super()._connect() as conn:
            # An explicit BEGIN: the connection is in autocommit, and switching costs more than a transaction.
            conn.exec_driver_sql("BEGIN")
            self._thread.connection = conn
            try:
                yield conn
            except BaseException:
                with suppress(sqlalchemy.exc.SQLAlchemyError):
                    conn.exec_driver_sql("ROLLBACK")
                raise
            else:
                conn.exec_driver_sql("COMMIT")
            finally:
                self._thread.connection = None

    def _connect(self) -> AbstractContextManager[sqlalchemy.Connection]:
        connection: sqlalchemy.Connection | None = getattr(self._thread, "connection", None)
        if connection is not None:
            return nullcontext(connection)
        self.flush()
        return super()._connect()


def _split_partitions(events: Sequence[Entry]) -> list[dg.EventLogEntry]:
    return list(chain.from_iterable(map(split_partitions, events)))


def _execution_status(evaluation: dg.AssetCheckEvaluation) -> AssetCheckExecutionRecordStatus:
    if evaluation.passed:
        return AssetCheckExecutionRecordStatus.SUCCEEDED
    return AssetCheckExecutionRecordStatus.FAILED


class PooledPostgresStorage(DagsterPostgresStorage):
    """dagster-postgres' storage with open connections and a BatchedEventLog.

    ``dagster.yaml`` names it as ``storage: custom:``. Without a ``config`` it is in the database that
    DAGSTER_POSTGRES_URL names, or in that of the deployment's settings, so that Dagster's own commands use the instance
    of the ``fhir-assets`` commands.
    """

    @classmethod
    def from_config_value(  # type: ignore[override]  # The signature of dagster-postgres.
        cls, inst_data: ConfigurableClassData | None, config_value: PostgresStorageConfig
    ) -> Self:
        """Return the storage for the ``config`` of ``dagster.yaml``; Dagster calls this."""
        token_provider = get_token_provider_from_config(config_value)
        is_configured = "postgres_url" in config_value or "postgres_db" in config_value
        url = pg_url_from_config(config_value) if is_configured else find_dagster_url(load_settings())
        if url not in CHECKED_DAGSTER_DATABASES:
            with suppress(DatabaseUnavailable):  # Dagster's own processes wait for the database.
                require_dagster_database(url)
        storage = cls(
            inst_data=inst_data,
            postgres_url=url,
            should_autocreate_tables=bool(config_value.get("should_autocreate_tables", True)),
            token_provider=token_provider,
        )
        storage._event_log_storage = BatchedEventLog(
            storage.postgres_url, storage.should_autocreate_tables, token_provider=token_provider
        )
        for part in (storage.run_storage, storage.event_log_storage, storage.schedule_storage):
            part.optimize_for_webserver(STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS, CONNECTIONS)
        return storage
