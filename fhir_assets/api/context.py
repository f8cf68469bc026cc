"""Objects that the routes of one process share: settings, warehouse, store, audit log and the client of Dagster.

Routes get them through the FastAPI dependencies at the end of this module.
"""

from asyncio import Task
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import BoundedSemaphore, Lock
from typing import Annotated, Any, cast
from uuid import uuid4

import psycopg
from fastapi import Depends, Request, Response
from psycopg_pool import ConnectionPool

from fhir_assets.api.access import Token
from fhir_assets.api.bodies import read_json_body
from fhir_assets.api.dagster import DagsterClient
from fhir_assets.api.problems import Problem
from fhir_assets.api.submissions import Submission, build_audit_records
from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.landing import build_landing_zone, build_receiver
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.validation import build_validator
from fhir_assets.deployment.views import build_views, find_reference_bases
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import DatabaseUnavailable
from fhir_assets.fhir.json_size import has_more_values
from fhir_assets.fhir.references import Bases
from fhir_assets.fhir.validation import Validator
from fhir_assets.foreign_errors import LOST, translate_error
from fhir_assets.metrics.exposition import render_metrics
from fhir_assets.metrics.pipeline import DatabaseCollector, build_collector
from fhir_assets.orchestration.dagster_internals import AssetGraph
from fhir_assets.pipeline.consent.posted import PostedDecisions
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.settings import Settings
from fhir_assets.storage.landing_zone import Zone
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import audit_log, record_posts, visits
from fhir_assets.warehouse.postgres.db.connections import Session, connection_pool
from fhir_assets.warehouse.postgres.db.group_commit import GroupCommit
from fhir_assets.warehouse.postgres.queries.patient_directory import PatientDirectory

POOL_SIZE = 8
CONNECTION_TIMEOUT_SECONDS = 5
"""Seconds that a request waits for a connection before the database counts as unavailable."""

MAX_WAITING_REQUESTS = 8
"""Number of requests that may wait for runs to end. Each occupies one of the 40 threads that answer requests."""
MAX_KEYED_REQUESTS = 8
"""Number of requests with an Idempotency-Key in progress. Each holds a connection of its own."""


class AppContext:
    """The objects that the routes of one process share. Each is opened on its first use."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.warehouse = Warehouse(settings)
        self.directory = PatientDirectory(self.warehouse.connect)
        self.wait_slots = BoundedSemaphore(MAX_WAITING_REQUESTS)
        self.health_check: Task[Response] | None = None
        """The check of readiness in progress, which all requests for it share."""
        self.keyed_slots = BoundedSemaphore(MAX_KEYED_REQUESTS)
        self._audit_commits = GroupCommit(self._write_audit_records)
        self._receive_commits = GroupCommit(self._receive_group)
        self._pool: ConnectionPool[Any] | None = None
        self._collector: DatabaseCollector | None = None
        self._lock = Lock()

    @cached_property
    def store(self) -> Store:
        """The store of partitions."""
        return build_store(self.settings)

    @cached_property
    def validator(self) -> Validator:
        """The validator of R4 resources."""
        return build_validator(self.settings)

    @cached_property
    def receiver(self) -> Receiver:
        """The receiver that writes records to ``raw``."""
        return build_receiver(self.settings, self.warehouse)

    @cached_property
    def _decisions(self) -> PostedDecisions:
        return PostedDecisions(
            lambda: build_views(self.settings).views, build_consent_gate(self.settings), self.settings.window_scheme
        )

    @cached_property
    def reference_bases(self) -> Bases:
        """The base URLs below which an absolute reference is one to the source."""
        return find_reference_bases(self.settings)

    @cached_property
    def zone(self) -> Zone:
        """The landing zone. Raises ConfigurationError if FHIR_LANDING_URL is not set."""
        return build_landing_zone(self.settings)

    @cached_property
    def dagster(self) -> DagsterClient:
        """The client of the Dagster webserver."""
        return DagsterClient(self.settings.dagster_webserver_url or self.settings.dagster_ui_url)

    @cached_property
    def asset_graph(self) -> AssetGraph:
        """The graph of the deployment's assets."""
        return build_definitions(self.settings).resolve_asset_graph()

    def derive_id(self, resource_type: str, number: str) -> str:
        """Return the resource id that is derived from an identifier, such as an MRN.

        The secret of the derivation is stored in the database. Raises DatabaseUnavailable.
        """
        return self.warehouse.cipher().identity(resource_type, number)

    @contextmanager
    def connection(self) -> Iterator[Session]:
        """Borrow a pooled connection. The transaction is committed at the end, or rolled back if the block raises.

        Raises DatabaseUnavailable.
        """
        try:
            with self._open_pool().connection(timeout=CONNECTION_TIMEOUT_SECONDS) as conn:
                yield conn
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise translate_error(error) or DatabaseUnavailable(LOST) from None

    @contextmanager
    def own_connection(self) -> Iterator[Session]:
        """Open a connection that is not of the pool, for work that waits for files or servers; as ``connection``."""
        try:
            with self.warehouse.connect() as conn:
                yield conn
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise translate_error(error) or DatabaseUnavailable(LOST) from None

    def record_audit(self, *audit_records: AuditRecord) -> None:
        """Write audit records. Routes call this before they return the data. Raises DatabaseUnavailable."""
        self._audit_commits.submit(audit_records)

    def _write_audit_records(self, groups: Sequence[Sequence[AuditRecord]]) -> list[None]:
        # Every commit of the audit log blocks all others, so simultaneous requests share one.
        with self.connection() as conn:
            audit_log.record(conn, *(audit_record for group in groups for audit_record in group))
        return [None] * len(groups)

    def receive_grouped(self, submission: Submission) -> None:
        """Receive a submission together with the submissions of simultaneous requests, in one part and one commit.

        Raises StoreError or DatabaseUnavailable.
        """
        self._receive_commits.submit(submission)

    def _receive_group(self, submissions: Sequence[Submission]) -> list[None]:
        self.receive(submissions, f"api:{uuid4().hex}")
        return [None] * len(submissions)

    def receive(self, submissions: Sequence[Submission], origin: str) -> None:
        """Write the records of all submissions to ``raw``, with their audit records and posts, or write nothing.

        The consents among the records take effect immediately. Raises StoreError or DatabaseUnavailable.
        """
        records = [record for submission in submissions for record in submission.records]
        if patients := [record for record in records if record.resource_type == "Patient"]:
            with self.connection() as conn:
                visits.record_elsewhere(
                    conn, [patient.id for patient in patients], max(patient.as_of for patient in patients)
                )

        audit_records: list[AuditRecord] = []

        def record_posts_and_decide(conn: Session) -> None:
            known = record_posts.find_known(conn, [key for submission in submissions for key in submission.keys])
            audit_records.extend(build_audit_records(conn, submissions, known))
            for submission in submissions:
                record_posts.record(conn, submission.build_post(origin), submission.keys)
                self._decisions.record(conn, submission.records, actor=submission.actor, now=self.warehouse.now())

        self.receiver.receive(
            records,
            origin,
            audit_records=lambda _: audit_records,
            before_commit=record_posts_and_decide,
            posted=True,
        )

    def render_metrics(self) -> tuple[bytes, str]:
        """Return the metrics in an exposition format of Prometheus, and its content type."""
        with self._lock:
            if self._collector is None:
                self._collector = build_collector(self.settings, self.warehouse.connect)
        return render_metrics(self._collector)

    def close(self) -> None:
        """Close the connection pool, after the mark of the audit log is written."""
        self.warehouse.audit_marker.finish()
        if self._pool is not None:
            self._pool.close()

    def _open_pool(self) -> ConnectionPool[Any]:
        with self._lock:
            if self._pool is None:
                pool = connection_pool(
                    self.warehouse.url(),
                    cipher=self.warehouse.cipher(),
                    size=POOL_SIZE,
                    source=self.settings.source,
                    on_audit=self.warehouse.audit_marker.note,
                )
                pool.open()
                self._pool = pool
            return self._pool


@dataclass(frozen=True, slots=True)
class Caller:
    """The token that a request presents, and the id of the request."""

    token: Token
    request_id: str

    @property
    def actor(self) -> str:
        """The caller's name in the audit log."""
        return self.token.actor


def _get_context(request: Request) -> AppContext:
    return cast(AppContext, request.app.state.context)


def _get_caller(request: Request) -> Caller:
    return Caller(request.scope["fhir_assets.token"], request.scope["fhir_assets.request_id"])


async def _read_body(request: Request) -> bytes:
    body = read_json_body(await request.body(), request.headers)
    limit = _get_context(request).settings.validation_max_values
    if has_more_values(body, limit):
        raise Problem(413, f"the body has more than {limit:,} values (VALIDATION_MAX_VALUES): send fewer in a request")
    return body


Context = Annotated[AppContext, Depends(_get_context)]
CurrentCaller = Annotated[Caller, Depends(_get_caller)]
RawBody = Annotated[bytes, Depends(_read_body)]
