"""The source of a deployment, as FHIR_SOURCE names it."""

from datetime import timedelta

from fhir_assets.deployment.credentials import credentials_of
from fhir_assets.deployment.store import store_of
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.bulk.client import validate_level
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.files.ndjson import NdjsonSource
from fhir_assets.fhir.search.history import DeletionHistory
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.fhir.source import Source
from fhir_assets.pipeline.fetch.bulk_source import BulkSource
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets.settings import Settings, SourceKind
from fhir_assets.storage.store import Store


def open_source(settings: Settings, *, store: Store | None = None, warehouse: Warehouse | None = None) -> Source:
    """The Source of the settings. Raises ConfigurationError; calls nothing yet.

    An export is kept in ``store``; it is noted, and calls take their turns, in ``warehouse``. Unset: the settings' own.
    """
    location = settings.require_source()
    if settings.fhir_source is SourceKind.NDJSON:
        return NdjsonSource(location)
    warehouse = warehouse or Warehouse(settings)
    client = open_client(settings, warehouse)
    if settings.fhir_source is SourceKind.SEARCH:
        return SearchSource(client, page_size=settings.fhir_page_size)
    return BulkSource(
        client,
        store or store_of(settings),
        warehouse.connect,
        level=validate_level(settings.fhir_bulk_level),
        type_filter=settings.fhir_bulk_type_filter,
        connections=settings.fhir_max_connections,
        fresh=timedelta(minutes=settings.fhir_bulk_fresh_minutes),
        limit=timedelta(days=settings.fhir_bulk_days),
    )


def open_history(settings: Settings, warehouse: Warehouse) -> DeletionHistory | None:
    """Where the source's deletions are read; None if FHIR_DELETES is off, or the source is no server."""
    if settings.fhir_deletes == "off" or settings.fhir_source is SourceKind.NDJSON:
        return None
    return DeletionHistory(open_client(settings, warehouse), page_size=settings.fhir_page_size)


def open_client(settings: Settings, warehouse: Warehouse) -> FhirClient:
    """A client of the FHIR server at FHIR_BASE_URL, which is called FHIR_MAX_CONNECTIONS times at once at most, by all
    processes that share the warehouse. Raises ConfigurationError; calls nothing yet.
    """
    return FhirClient(
        settings.require_source(),
        credentials=credentials_of(settings, settings.require_source()),
        timeout=settings.fhir_timeout_seconds,
        retrier=Retrier(RetryPolicy(attempts=settings.fhir_max_attempts)),
        connections=settings.fhir_max_connections,
        call_slot=warehouse.source_calls.slot,
    )
