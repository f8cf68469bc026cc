"""The source of a deployment, as configured by FHIR_SOURCE, and the client of its FHIR server."""

from collections.abc import Callable
from datetime import timedelta

from fhir_assets.deployment.credentials import build_account_credentials
from fhir_assets.deployment.file_limits import build_file_limits
from fhir_assets.deployment.labels import SOURCE_LABELS
from fhir_assets.deployment.limits import build_client_limits
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.bulk.client import validate_level
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.files.ndjson import NdjsonSource
from fhir_assets.fhir.search.existence import ExistenceReader
from fhir_assets.fhir.search.history import DeletionHistory
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.fhir.source import Source
from fhir_assets.pipeline.fetch.bulk_source import BulkSource
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets.settings import Settings, SourceKind
from fhir_assets.storage.store import Store

_QUICK_ATTEMPTS = 2
_QUICK_SECONDS = 10.0
_QUICK_ANSWER_SECONDS = 30.0


def open_source(
    settings: Settings,
    *,
    store: Store | None = None,
    warehouse: Warehouse | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
    persistent: bool = False,
) -> Source:
    """Return the source of the settings; no request is sent. Raises ConfigurationError.

    A bulk export is stored in ``store`` and recorded in ``warehouse``, which also limits the calls to the server; both
    are built from the settings by default. ``on_progress`` receives a message whenever an export makes progress. A
    ``persistent`` source makes FHIR_MAX_ATTEMPTS attempts even if the server has never answered; otherwise it makes
    only a few.
    """
    settings.require_source()
    warehouse = warehouse or Warehouse(settings)
    if settings.fhir_source is SourceKind.NDJSON:
        return open_files(settings, warehouse)
    client = open_client(settings, warehouse, persistent=persistent)
    if settings.fhir_source is SourceKind.SEARCH:
        return SearchSource(client, page_size=settings.fhir_page_size, now=warehouse.now)
    return BulkSource(
        client,
        store or build_store(settings),
        warehouse.connect,
        level=validate_level(settings.fhir_bulk_level, SOURCE_LABELS),
        type_filter=settings.fhir_bulk_type_filter,
        oldest=settings.window_scheme.start if settings.fhir_last_updated_gte else None,
        overlap=settings.overlap,
        connections=settings.fhir_max_connections,
        reuse_within=timedelta(minutes=settings.fhir_bulk_fresh_minutes),
        time_limit=timedelta(days=settings.fhir_bulk_days),
        now=warehouse.now,
        on_progress=on_progress,
    )


def open_files(settings: Settings, warehouse: Warehouse) -> NdjsonSource:
    """Return the files at FHIR_BASE_URL as a source. Raises ConfigurationError.

    With encryption keys, messages and dead letters have labels in place of names, which may be those of patients.
    """

    def label(name: str) -> str:
        return f"file-{warehouse.cipher().hash_file_name(warehouse.source, 'ndjson', name)}"

    return NdjsonSource(
        settings.require_source(),
        labels=SOURCE_LABELS,
        name_file=label if settings.encrypts else str,
        max_line_bytes=settings.validation_max_bytes,
        max_values=settings.validation_max_values,
        file_limits=build_file_limits(settings),
        now=warehouse.now,
    )


def open_quick_source(settings: Settings, *, store: Store, warehouse: Warehouse) -> Source:
    """Return a source with short timeouts, for callers that need an answer soon. No request is sent.

    Raises ConfigurationError.
    """
    limits = {
        "fhir_max_attempts": min(settings.fhir_max_attempts, _QUICK_ATTEMPTS),
        "fhir_timeout_seconds": min(settings.fhir_timeout_seconds, _QUICK_SECONDS),
        "fhir_answer_seconds": min(settings.fhir_answer_seconds or _QUICK_ANSWER_SECONDS, _QUICK_ANSWER_SECONDS),
    }
    return open_source(settings.model_copy(update=limits), store=store, warehouse=warehouse)


def open_history(settings: Settings, warehouse: Warehouse) -> DeletionHistory | None:
    """Return the reader of the source's deletions, or None if FHIR_DELETES is off or the source is not a server."""
    if settings.fhir_deletes == "off" or settings.fhir_source is SourceKind.NDJSON:
        return None
    return DeletionHistory(open_client(settings, warehouse), page_size=settings.fhir_page_size)


def open_existence_reader(settings: Settings, warehouse: Warehouse) -> ExistenceReader | None:
    """Return the reader that checks by id whether resources still exist, or None if the source is not a server."""
    if settings.fhir_source is SourceKind.NDJSON:
        return None
    return ExistenceReader(open_client(settings, warehouse), connections=settings.fhir_max_connections)


def open_client(settings: Settings, warehouse: Warehouse, *, persistent: bool = False) -> FhirClient:
    """Return a client of the FHIR server at FHIR_BASE_URL; no request is sent. Raises ConfigurationError.

    All processes that share the warehouse make at most FHIR_MAX_CONNECTIONS calls at the same time.
    """
    return FhirClient(
        settings.require_source(),
        link_base=settings.fhir_link_base,
        file_origins=settings.fhir_file_origins,
        credentials=build_account_credentials(settings, settings.require_source()),
        timeout=settings.fhir_timeout_seconds,
        limits=build_client_limits(settings, SOURCE_LABELS),
        retrier=Retrier(RetryPolicy(attempts=settings.fhir_max_attempts)),
        connections=settings.fhir_max_connections,
        call_slot=warehouse.source_calls.slot,
        labels=SOURCE_LABELS,
        persistent=persistent,
    )
