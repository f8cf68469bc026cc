"""The source of a deployment, as FHIR_SOURCE names it."""

from datetime import timedelta
from pathlib import Path

from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.auth import Credentials, credentials
from fhir_assets.fhir.bulk import checked_level
from fhir_assets.fhir.client import FhirClient
from fhir_assets.fhir.history import DeletionHistory
from fhir_assets.fhir.ndjson import NdjsonSource
from fhir_assets.fhir.record import Source
from fhir_assets.fhir.retries import Retrier, RetryPolicy
from fhir_assets.fhir.search import SearchSource
from fhir_assets.fhir.smart import BackendServices, private_key
from fhir_assets.pipeline.bulk import BulkSource
from fhir_assets.resources.store import store_of
from fhir_assets.resources.warehouse import Warehouse
from fhir_assets.settings import Settings, SourceKind
from fhir_assets.store.store import Store


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
        level=checked_level(settings.fhir_bulk_level),
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
        credentials=credentials_of(settings),
        timeout=settings.fhir_timeout_seconds,
        retrier=Retrier(RetryPolicy(attempts=settings.fhir_max_attempts)),
        connections=settings.fhir_max_connections,
        turn=warehouse.calls.one,
    )


def credentials_of(settings: Settings) -> Credentials:
    """How the settings FHIR_AUTH_* say who we are. Raises ConfigurationError."""
    secret = settings.fhir_auth_client_secret
    if settings.fhir_auth_client_id:
        key = _key_text(settings)
        if (key is None) == (secret is None):
            raise ConfigurationError(
                "FHIR_AUTH_CLIENT_ID needs either FHIR_AUTH_PRIVATE_KEY (or _FILE) or FHIR_AUTH_CLIENT_SECRET"
            )
        return BackendServices(
            settings.require_source(),
            settings.fhir_auth_client_id,
            key=private_key(key, settings.fhir_auth_key_id) if key else None,
            secret=secret.get_secret_value() if secret else None,
            token_url=settings.fhir_auth_token_url,
            scope=settings.fhir_auth_scope,
        )
    password, token = settings.fhir_auth_password, settings.fhir_auth_token
    return credentials(
        settings.fhir_auth_username,
        password.get_secret_value() if password else None,
        token.get_secret_value() if token else None,
    )


def _key_text(settings: Settings) -> str | None:
    if settings.fhir_auth_private_key:
        return settings.fhir_auth_private_key.get_secret_value()
    path: Path | None = settings.fhir_auth_private_key_file
    if path is None:
        return None
    try:
        return path.expanduser().read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigurationError(f"FHIR_AUTH_PRIVATE_KEY_FILE cannot be read: {why}") from None
