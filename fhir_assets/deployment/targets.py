"""Clients of the FHIR servers that the deployment writes to."""

from threading import Event

from fhir_assets.deployment.credentials import Account, Scope, build_account_credentials
from fhir_assets.deployment.limits import build_client_limits
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets.settings import Settings


def build_upload_client(settings: Settings, *, workers: int, stop: Event) -> FhirClient:
    """Return a client of the server at FHIR_BASE_URL for `fhir-assets upload`. Setting ``stop`` ends its waits.

    Raises ConfigurationError.
    """
    if not settings.fhir_base_url:
        raise ConfigurationError(
            "the upload has no target: pass --url, or set FHIR_BASE_URL to the base URL of the FHIR server"
        )
    return _client(settings, settings.fhir_base_url, Account.SOURCE, workers, stop)


def build_delivery_client(settings: Settings, *, workers: int, stop: Event) -> FhirClient:
    """Return a client of the server at FHIR_DELIVERY_URL. It never uses the credentials of the source."""
    return _client(settings, settings.fhir_delivery_url, Account.DELIVERY, workers, stop)


def _client(settings: Settings, url: str, account: Account, workers: int, stop: Event) -> FhirClient:
    return FhirClient(
        url,
        credentials=build_account_credentials(settings, url, account=account, scope=Scope.WRITE),
        timeout=settings.fhir_timeout_seconds,
        limits=build_client_limits(settings, account.labels),
        retrier=Retrier(RetryPolicy(attempts=settings.fhir_max_attempts), sleep=stop.wait),
        connections=workers,
        labels=account.labels,
    )
