"""A connector as the settings describe it."""

from dataclasses import dataclass
from datetime import timedelta

from fhir_assets.delivery.connector.delivery import Delivery
from fhir_assets.delivery.connector.mapping import BUILT_IN, Source, load_mapping
from fhir_assets.delivery.connector.outbox import Connect
from fhir_assets.delivery.connector.runner import Connector, Pace
from fhir_assets.delivery.connector.server import FhirServer
from fhir_assets.deployment.credentials import Scope, build_account_credentials
from fhir_assets.errors import ConfigurationError
from fhir_assets.retries import RetryPolicy
from fhir_assets.settings import Settings


def sources_of(settings: Settings) -> dict[str, Source]:
    """The sources of the mapping in force."""
    return load_mapping(settings.connector_mapping or BUILT_IN)


@dataclass(frozen=True, slots=True)
class OwnConnector:
    """A connector and the connections to its server; close it when it has run."""

    connector: Connector
    server: FhirServer

    def run(self, *, until_empty: bool = False) -> None:
        """See Connector."""
        self.connector.run(until_empty=until_empty)

    def stop(self) -> None:
        """See Connector."""
        self.connector.stop()

    def close(self) -> None:
        """Let the connections to the server go."""
        self.server.close()


def connector_of(settings: Settings, connect: Connect, *, workers: int | None = None) -> OwnConnector:
    """A connector from the outbox behind ``connect`` to FHIR_BASE_URL. Raises ConfigurationError."""
    if not settings.fhir_base_url:
        raise ConfigurationError("FHIR_BASE_URL is not set: give the base URL of the FHIR server to deliver to")
    count = workers or settings.connector_workers
    server = FhirServer(
        settings.fhir_base_url,
        build_account_credentials(settings, settings.fhir_base_url, scope=Scope.WRITE),
        timeout=settings.fhir_timeout_seconds,
        connections=count,
    )
    sources = sources_of(settings)
    pace = Pace(
        workers=count,
        poll=settings.connector_poll_seconds,
        policy=RetryPolicy(
            attempts=settings.connector_max_attempts,
            first_wait=settings.connector_first_wait_seconds,
            max_wait=settings.connector_max_wait_seconds,
        ),
        keep=timedelta(days=settings.connector_keep_days),
    )
    return OwnConnector(Connector(connect, sources, Delivery(sources, server), pace), server)
