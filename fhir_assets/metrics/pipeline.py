"""Metrics that are read from the database: outbox, runs, windows behind, resources, dead letters, check results.

The database is read when Prometheus scrapes, but at most once in ``MAX_AGE_SECONDS``. A table that does not exist
yields no series. If the database cannot be reached, the only series is ``fhir_database_up 0``.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Lock
from typing import Any, LiteralString

import psycopg
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fhir_assets.errors import FhirAssetsError
from fhir_assets.metrics.exposition import REGISTRY
from fhir_assets.settings import Settings
from fhir_assets.warehouse.postgres.db import connections, embedded
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenConnection
from fhir_assets.windows import WindowScheme

MAX_AGE_SECONDS = 5.0

_MISSING_TABLE = (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn, psycopg.errors.InvalidSchemaName)

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _Gauge:
    """A gauge whose query returns its labels and, as the last column, its value."""

    name: str
    help: str
    labels: tuple[str, ...]
    query: LiteralString


_GAUGES = (
    _Gauge(
        "fhir_outbox_unprocessed_count",
        "Changes in the outbox that the FHIR server has not acknowledged",
        (),
        """
        SELECT count(*)
        FROM health.fhir_outbox
        WHERE processed_at IS NULL
        """,
    ),
    _Gauge(
        "fhir_outbox_retrying_count",
        "Changes in the outbox that wait for another attempt after a failure",
        (),
        """
        SELECT count(*)
        FROM health.fhir_outbox
        WHERE processed_at IS NULL AND claimed_by IS NULL AND attempts > 0
        """,
    ),
    _Gauge(
        "fhir_outbox_lag_seconds",
        "Age of the oldest change in the outbox that is not acknowledged",
        (),
        """
        SELECT greatest(0, coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0))
        FROM health.fhir_outbox
        WHERE processed_at IS NULL
        """,
    ),
    _Gauge(
        "fhir_dlq_total",
        "Open dead letters of the connector",
        (),
        """
        SELECT count(*)
        FROM health.fhir_dlq
        WHERE status = 'open'
        """,
    ),
    _Gauge(
        "fhir_dlq_by_reason",
        "Open dead letters of the connector by reason",
        ("reason",),
        """
        SELECT reason, count(*)
        FROM health.fhir_dlq
        WHERE status = 'open'
        GROUP BY 1
        """,
    ),
    _Gauge(
        "fhir_runs",
        "Ingestion runs by status",
        ("status",),
        """
        SELECT status, count(DISTINCT run_id)
        FROM ops.ingestion_runs
        GROUP BY 1
        """,
    ),
    _Gauge(
        "fhir_last_success_timestamp_seconds",
        "Time of the last successful load of the type",
        ("type",),
        """
        SELECT resource_type, extract(epoch FROM max(finished_at))
        FROM ops.ingestion_runs
        WHERE status = 'SUCCESS'
        GROUP BY 1
        """,
    ),
    _Gauge(
        "fhir_dead_letters",
        "Open dead letters of the pipeline by stage and rule",
        ("stage", "rule"),
        """
        SELECT stage, rule, count(*)
        FROM ops.dead_letters
        WHERE status = 'open'
        GROUP BY 1, 2
        """,
    ),
    _Gauge(
        "fhir_unaccounted_resources",
        "Resources that were fetched but are neither loaded, dead letters nor withheld, in the windows' latest runs",
        ("type",),
        """
        SELECT resource_type,
               sum(abs(fetched - coalesce(loaded, valid, 0) - coalesce(dead, 0) - coalesce(withheld, 0)))
        FROM (
            SELECT DISTINCT ON (resource_type, partition_key) *
            FROM ops.ingestion_runs
            WHERE status = 'SUCCESS'
            ORDER BY resource_type, partition_key, started_at DESC
        ) latest
        WHERE fetched IS NOT NULL
        GROUP BY 1
        """,
    ),
)

_RESOURCES: LiteralString = """
    SELECT layer, resource_type, sum(resources)
    FROM ops.ingestion_runs,
         LATERAL (
             VALUES ('raw', fetched), ('validated', valid), ('normalized', loaded)
         ) AS counts (layer, resources)
    WHERE resources IS NOT NULL
    GROUP BY 1, 2
"""

_NOT_LOADED: LiteralString = """
    SELECT reason, resource_type, sum(resources)
    FROM ops.ingestion_runs,
         LATERAL (
             VALUES ('older', older), ('dead', dead), ('withheld', withheld), ('superseded', superseded)
         ) AS counts (reason, resources)
    WHERE resources IS NOT NULL
    GROUP BY 1, 2
"""

_CHECKPOINTS: LiteralString = """
    SELECT resource_type, loaded_until
    FROM ops.checkpoints
"""

_CHECKS: LiteralString = """
    SELECT check_name, execution_status, count(*)
    FROM (
        SELECT DISTINCT ON (asset_key, check_name, partition) *
        FROM asset_check_executions
        ORDER BY asset_key, check_name, partition, id DESC
    ) latest
    WHERE execution_status IN ('SUCCEEDED', 'FAILED')
    GROUP BY 1, 2
"""
"""A query of Dagster's own database."""


class DatabaseCollector(Collector):
    """Collect the metrics of a deployment's database.

    ``connect_dagster`` connects to Dagster's own database, for check results; with None they are left out.
    """

    def __init__(
        self,
        connect: OpenConnection,
        connect_dagster: OpenConnection | None,
        scheme: WindowScheme,
    ) -> None:
        self._connect = connect
        self._connect_dagster = connect_dagster
        self._scheme = scheme
        self._lock = Lock()
        self._read_at = float("-inf")
        self._metrics: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering this collector does not read the database."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return the metrics, at most MAX_AGE_SECONDS old."""
        with self._lock:
            if time.monotonic() - self._read_at >= MAX_AGE_SECONDS:
                self._metrics = self._read()
                self._read_at = time.monotonic()
            return self._metrics

    def _read(self) -> list[Metric]:
        up = GaugeMetricFamily("fhir_database_up", "1 if the database answered")
        try:
            with self._connect() as conn:
                conn.autocommit = True
                metrics = [*self._read_tables(conn)]
        except (psycopg.Error, FhirAssetsError):
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        return [up, *metrics, *self._read_check_results()]

    def _read_tables(self, conn: Connection) -> Iterator[Metric]:
        for gauge in _GAUGES:
            if (rows := _fetch_rows(conn, gauge.query)) is not None:
                yield _add_rows(GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.labels), rows)
        if (rows := _fetch_rows(conn, _RESOURCES)) is not None:
            resources = CounterMetricFamily(
                "fhir_resources", "Resources written to a layer, over all runs", labels=["layer", "type"]
            )
            yield _add_rows(resources, rows)
        if (rows := _fetch_rows(conn, _NOT_LOADED)) is not None:
            not_loaded = CounterMetricFamily(
                "fhir_resources_not_loaded",
                "Resources that a run did not load, by reason: older, dead, withheld or superseded, over all runs",
                labels=["reason", "type"],
            )
            yield _add_rows(not_loaded, rows)
        if (rows := _fetch_rows(conn, _CHECKPOINTS)) is not None:
            behind = GaugeMetricFamily(
                "fhir_windows_behind",
                "Windows between a type's checkpoint and now, including the open window",
                labels=["type"],
            )
            now = datetime.now(UTC)
            yield _add_rows(
                behind, [(name, len(list(self._scheme.between(min(until, now), now)))) for name, until in rows]
            )

    def _read_check_results(self) -> Iterator[Metric]:
        if self._connect_dagster is None:
            return
        try:
            with self._connect_dagster() as conn:
                rows = _fetch_rows(conn, _CHECKS)
        except (psycopg.Error, FhirAssetsError):
            return
        if rows is not None:
            results = GaugeMetricFamily(
                "fhir_check_results",
                "Latest evaluations of asset checks over all partitions",
                labels=["check", "status"],
            )
            yield _add_rows(results, [(check, status.lower(), count) for check, status, count in rows])


def build_collector(settings: Settings, connect: OpenConnection) -> DatabaseCollector:
    """Return a collector of the database's metrics, without registering it."""
    return DatabaseCollector(connect, lambda: connections.connect(dagster_url(settings)), settings.window_scheme)


@contextmanager
def register_database_metrics(settings: Settings, connect: OpenConnection) -> Iterator[None]:
    """Register the database's metrics with the process's registry during the block."""
    collector = build_collector(settings, connect)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


def dagster_url(settings: Settings) -> str:
    """Return the URL of Dagster's own database. Raises DatabaseUnavailable."""
    if url := settings.find_dagster_url():
        return connections.normalise_url(url)
    if settings.db_url is None:
        return embedded.ensure(settings.home, embedded.DAGSTER_DATABASE, port=settings.fhir_postgres_port)
    return connections.with_database(settings.db_url.get_secret_value(), embedded.DAGSTER_DATABASE)


def _fetch_rows(conn: Connection, query: LiteralString) -> Rows | None:
    try:
        return conn.execute(query).fetchall()
    except (*_MISSING_TABLE, psycopg.errors.InsufficientPrivilege):
        # The login of a process may read what its own metrics need, and not all that this collector knows.
        return None


def _add_rows(family: GaugeMetricFamily | CounterMetricFamily, rows: Rows) -> Metric:
    for *labels, value in rows:
        family.add_metric([str(label) for label in labels], float(value))
    return family
