"""Builds the connector of a deployment."""

from dataclasses import dataclass
from datetime import timedelta

from fhir_assets.delivery.connector.delivery import Delivery
from fhir_assets.delivery.connector.mapping import BUILT_IN, Source, load_mapping
from fhir_assets.delivery.connector.runner import Connector, RunnerOptions
from fhir_assets.delivery.connector.server import FhirServer
from fhir_assets.deployment.credentials import Account, Scope, build_account_credentials
from fhir_assets.deployment.limits import build_client_limits
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
    """Return a connector that delivers the outbox of the database to CONNECTOR_URL, or else to FHIR_BASE_URL.

    Raises ConfigurationError if neither is set or the mapping is not valid.
    """
    url = settings.connector_url or settings.fhir_base_url
    if not url:
        raise ConfigurationError("CONNECTOR_URL is not set: set it to the base URL of the FHIR server to deliver to")
    count = workers or settings.connector_workers
    account = _select_account(settings)
    server = FhirServer(
        url,
        build_account_credentials(settings, url, account=account, scope=Scope.WRITE),
        timeout=settings.fhir_timeout_seconds,
        limits=build_client_limits(settings, account.labels).answer,
        connections=count,
        labels=account.labels,
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


def _select_account(settings: Settings) -> Account:
    """Return the account of the connector: its own at CONNECTOR_URL, or if it is set, else the one of FHIR_BASE_URL."""
    own = settings.connector_url or settings.connector_auth_username or settings.connector_auth_token
    return Account.CONNECTOR if own or settings.connector_auth_client_id else Account.SOURCE
