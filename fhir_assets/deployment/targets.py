"""The FHIR servers that are written to."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from fhir_assets.deployment.credentials import Account, Scope, credentials_of
from fhir_assets.errors import ConfigurationError, NotFhir, ServerRefused, ServerUnavailable
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets.settings import Settings

_OF_A_SERVER = (ServerUnavailable, ServerRefused, NotFhir, ConfigurationError)


def upload_client(settings: Settings, *, workers: int, stop: Event) -> FhirClient:
    """A client of the server at FHIR_BASE_URL, as the target of `fhir-assets upload`; ``stop`` ends its waits."""
    if not settings.fhir_base_url:
        raise ConfigurationError("nowhere to upload to: give --url or set FHIR_BASE_URL to the FHIR server's base URL")
    return _client(settings, settings.fhir_base_url, Account.SOURCE, workers, stop)


def delivery_client(settings: Settings, *, workers: int, stop: Event) -> FhirClient:
    """A client of the server at FHIR_DELIVERY_URL. It never gets the credentials of the source."""
    return _client(settings, settings.fhir_delivery_url, Account.DELIVERY, workers, stop)


@contextmanager
def delivering() -> Iterator[None]:
    """Errors of the server at FHIR_DELIVERY_URL name its own settings."""
    try:
        yield
    except _OF_A_SERVER as error:
        kind = next(kind for kind in _OF_A_SERVER if isinstance(error, kind))
        text = str(error).replace("FHIR_BASE_URL", "FHIR_DELIVERY_URL").replace("FHIR_AUTH_", "FHIR_DELIVERY_")
        raise kind(text) from None


def _client(settings: Settings, url: str, account: Account, workers: int, stop: Event) -> FhirClient:
    def sleep(seconds: float) -> None:
        stop.wait(seconds)

    return FhirClient(
        url,
        credentials=credentials_of(settings, url, account=account, scope=Scope.WRITE),
        timeout=settings.fhir_timeout_seconds,
        retrier=Retrier(RetryPolicy(attempts=settings.fhir_max_attempts), sleep=sleep),
        connections=workers,
    )
