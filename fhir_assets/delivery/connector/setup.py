"""Builds the connector of a deployment."""

from dataclasses import dataclass
from datetime import timedelta

from fhir_assets.delivery.connector.delivery import Delivery
from fhir_assets.delivery.connector.mapping import BUILT_IN, Source, load_mapping
from fhir_assets.delivery.connector.runner import Connector, RunnerOptions
from fhir_assets.delivery.connector.server import FhirServer
from fhir_assets.deployment.credentials import Scope, build_account_credentials
from fhir_assets.errors import ConfigurationError
from fhir_assets.retries import RetryPolicy
from fhir_assets.settings import Settings
from fhir_assets.warehouse.postgres.db.connections import OpenSession


def load_sources(settings: Settings) -> dict[str, Source]:
    """Return the sources of the configured mapping."""
    return load_mapping(settings.connector_mapping or BUILT_IN)


@dataclass(frozen=True, slots=True)
class ConfiguredConnector:
    """A connector and the connections to its server. Close it after it has run."""

    connector: Connector
    server: FhirServer

    def run(self, *, until_empty: bool = False) -> None:
        """Run the connector (``Connector.run``)."""
        self.connector.run(until_empty=until_empty)

    def stop(self) -> None:
        """Stop the connector (``Connector.stop``)."""
        self.connector.stop()

    def close(self) -> None:
        """Close the connections to the server."""
        self.server.close()


def build_connector(settings: Settings, connect: OpenSession, *, workers: int | None = None) -> ConfiguredConnector:
    """Return a connector that delivers the outbox of the database to FHIR_BASE_URL.

    Raises ConfigurationError if FHIR_BASE_URL is not set or the mapping is not valid.
    """
    if not settings.fhir_base_url:
        raise ConfigurationError("FHIR_BASE_URL is not set: set it to the base URL of the FHIR server to deliver to")
    count = workers or settings.connector_workers
    server = FhirServer(
        settings.fhir_base_url,
        build_account_credentials(settings, settings.fhir_base_url, scope=Scope.WRITE),
        timeout=settings.fhir_timeout_seconds,
        connections=count,
    )
    sources = load_sources(settings)
    options = RunnerOptions(
        workers=count,
        poll=settings.connector_poll_seconds,
        policy=RetryPolicy(
            attempts=settings.connector_max_attempts,
            first_wait=settings.connector_first_wait_seconds,
            max_wait=settings.connector_max_wait_seconds,
        ),
        keep=timedelta(days=settings.connector_keep_days),
    )
    delivery = Delivery(sources, server, take_over=settings.connector_take_over)
    return ConfiguredConnector(Connector(connect, sources, delivery, options), server)
