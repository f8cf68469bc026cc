"""The source of a deployment, as FHIR_SOURCE names it."""

from fhir_assets.fhir.auth import credentials
from fhir_assets.fhir.client import FhirClient
from fhir_assets.fhir.history import DeletionHistory
from fhir_assets.fhir.ndjson import NdjsonSource
from fhir_assets.fhir.record import Source
from fhir_assets.fhir.retries import Retrier, RetryPolicy
from fhir_assets.fhir.search import SearchSource
from fhir_assets.settings import Settings, SourceKind


def open_source(settings: Settings) -> Source:
    """The Source of the settings. Raises ConfigurationError; calls nothing yet."""
    location = settings.require_source()
    if settings.fhir_source is SourceKind.NDJSON:
        return NdjsonSource(location)
    return SearchSource(open_client(settings), page_size=settings.fhir_page_size)


def open_history(settings: Settings) -> DeletionHistory | None:
    """Where the source's deletions are read; None if FHIR_DELETES is off, or the source is no server."""
    if settings.fhir_deletes == "off" or settings.fhir_source is SourceKind.NDJSON:
        return None
    return DeletionHistory(open_client(settings), page_size=settings.fhir_page_size)


def open_client(settings: Settings) -> FhirClient:
    """A client of the FHIR server at FHIR_BASE_URL. Raises ConfigurationError; calls nothing yet."""
    password, token = settings.fhir_auth_password, settings.fhir_auth_token
    return FhirClient(
        settings.require_source(),
        credentials=credentials(
            settings.fhir_auth_username,
            password.get_secret_value() if password else None,
            token.get_secret_value() if token else None,
        ),
        timeout=settings.fhir_timeout_seconds,
        retrier=Retrier(RetryPolicy(attempts=settings.fhir_max_attempts)),
        connections=settings.fhir_max_connections,
    )
