"""What the routes work with, opened once a process: the database, the doors into raw, Dagster."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import BoundedSemaphore, Lock
from typing import Annotated, Any, cast
from uuid import uuid4

import psycopg
from dagster._core.definitions.assets.graph.asset_graph import AssetGraph
from fastapi import Depends, Request
from psycopg_pool import ConnectionPool, PoolTimeout

from fhir_assets.api.access import Token
from fhir_assets.api.dagster import DagsterClient
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.landing import receiver_of, zone_of
from fhir_assets.deployment.store import store_of
from fhir_assets.deployment.validation import build_validator
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.record import Record
from fhir_assets.fhir.validation import Validator
from fhir_assets.metrics.exposition import exposition
from fhir_assets.metrics.pipeline import DatabaseCollector, observer_of
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.settings import Settings
from fhir_assets.storage.landing_zone import Zone
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, visits
from fhir_assets.warehouse.postgres.db.connections import Session, connection_pool
from fhir_assets.warehouse.postgres.db.group_commit import GroupCommit
from fhir_assets.warehouse.postgres.queries.patient_directory import Directory

POOL_SIZE = 8
PATIENCE_SECONDS = 5
"""How long a request waits for a connection until the database counts as away."""

WAITING = 8
"""How many requests may wait for runs to end, of the 40 threads that answer requests."""
_DOWN = "Postgres cannot be reached: start it, or correct DB_URL, then try again"


@dataclass(frozen=True, slots=True)
class Posted:
    """What one request brings, and what is to be on record of it."""

    records: Sequence[Record]
    audit_records: Sequence[AuditRecord]


class AppContext:
    """Made without touching anything: what is asked for first is opened first."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.warehouse = Warehouse(settings)
        self.directory = Directory(self.warehouse.connect)
        self.waiting = BoundedSemaphore(WAITING)
        self._record = GroupCommit(self._note)
        self._received = GroupCommit(self._receive_all)
        self._pool: ConnectionPool[Any] | None = None
        self._collector: DatabaseCollector | None = None
        self._lock = Lock()

    @cached_property
    def store(self) -> Store:
        return store_of(self.settings)

    @cached_property
    def validator(self) -> Validator:
        return build_validator(self.settings)

    @cached_property
    def receiver(self) -> Receiver:
        return receiver_of(self.settings, self.warehouse)

    @cached_property
    def zone(self) -> Zone:
        """The landing zone. Raises ConfigurationError if there is none."""
        return zone_of(self.settings)

    @cached_property
    def dagster(self) -> DagsterClient:
        return DagsterClient(self.settings.dagster_webserver_url or self.settings.dagster_ui_url)

    @cached_property
    def asset_graph(self) -> AssetGraph:
        return build_definitions(self.settings).resolve_asset_graph()

    def identify(self, resource_type: str, number: str) -> str:
        """The id of the resource that is known by a number. Raises DatabaseUnavailable: the key is in the database."""
        return self.warehouse.cipher().identity(resource_type, number)

    @contextmanager
    def connection(self) -> Iterator[Session]:
        """A pooled connection; what was done is committed unless it raises. Raises DatabaseUnavailable."""
        try:
            with self._opened().connection(timeout=PATIENCE_SECONDS) as conn:
                yield conn
        except (PoolTimeout, psycopg.OperationalError, psycopg.InterfaceError):
            raise DatabaseUnavailable(_DOWN) from None

    def note(self, *audit_records: AuditRecord) -> None:
        """Deeds on record, before anybody hears of them. Raises DatabaseUnavailable."""
        self._record.do(audit_records)

    def _note(self, asked: Sequence[Sequence[AuditRecord]]) -> list[None]:
        # Each commit of the log keeps all others waiting: those who read at the same time share one.
        with self.connection() as conn:
            audit_log.record(conn, *(audit_record for audit_records in asked for audit_record in audit_records))
        return [None] * len(asked)

    def receive_together(self, posted: Posted) -> None:
        """As ``receive``, together with what others post at the same time: one part, one commit for all of them."""
        self._received.do(posted)

    def _receive_all(self, posts: Sequence[Posted]) -> list[None]:
        self.receive(posts, f"api:{uuid4().hex}")
        return [None] * len(posts)

    def receive(self, posts: Sequence[Posted], origin: str) -> None:
        """Everything is in raw and on record when it returns, or nothing is. Raises StoreError, DatabaseUnavailable."""
        records = [record for post in posts for record in post.records]
        if people := [record for record in records if record.resource_type == "Patient"]:
            with self.connection() as conn:
                visits.said_elsewhere(conn, [each.id for each in people], max(each.as_of for each in people))
        self.receiver.receive(
            records,
            origin,
            audit_records=lambda _: (audit_record for post in posts for audit_record in post.audit_records),
        )

    def metrics(self) -> tuple[bytes, str]:
        """What Prometheus is told, and its content type."""
        with self._lock:
            if self._collector is None:
                self._collector = observer_of(self.settings, self.warehouse.connect)
        return exposition(self._collector)

    def close(self) -> None:
        """End what was opened."""
        if self._pool is not None:
            self._pool.close()

    def _opened(self) -> ConnectionPool[Any]:
        with self._lock:
            if self._pool is None:
                pool = connection_pool(self.warehouse.url(), cipher=self.warehouse.cipher(), size=POOL_SIZE)
                pool.open()
                self._pool = pool
            return self._pool


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and which of its requests this is."""

    token: Token
    request_id: str

    @property
    def actor(self) -> str:
        return self.token.actor


def _context(request: Request) -> AppContext:
    return cast(AppContext, request.app.state.context)


def _caller(request: Request) -> Caller:
    return Caller(request.scope["fhir_assets.token"], request.scope["fhir_assets.request_id"])


async def _body(request: Request) -> bytes:
    return await request.body()


ContextOf = Annotated[AppContext, Depends(_context)]
CallerOf = Annotated[Caller, Depends(_caller)]
Body = Annotated[bytes, Depends(_body)]
