"""The doors of a deployment beside its source, as its settings describe them."""

from functools import partial

from fhir_assets.deployment.encryption import build_store_cipher
from fhir_assets.deployment.store import build_bucket, build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.pipeline.landing.step import LandingStep
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.settings import Settings
from fhir_assets.storage.landing_zone import EncryptedZone, Zone, open_zone


def build_receiver(settings: Settings, warehouse: Warehouse) -> Receiver:
    """What receives resources into the deployment's store."""
    return Receiver(build_store(settings), warehouse.connect, settings.window_scheme, settings.fhir_resource_types)


def build_landing_zone(settings: Settings) -> Zone:
    """The zone at FHIR_LANDING_URL. Raises ConfigurationError if it is unset; calls nothing yet."""
    if not settings.fhir_landing_url:
        raise ConfigurationError(
            "FHIR_LANDING_URL is not set: give a folder or s3://bucket/prefix where files land, in the environment or "
            "in .env"
        )
    return EncryptedZone(
        open_zone(settings.fhir_landing_url, bucket=partial(build_bucket, settings)), build_store_cipher(settings)
    )


def build_landing_step(settings: Settings, warehouse: Warehouse) -> LandingStep:
    """The landing zone of the deployment. Raises ConfigurationError."""
    return LandingStep(
        build_landing_zone(settings),
        build_receiver(settings, warehouse),
        warehouse.connect,
        max_bytes=settings.validation_max_bytes,
    )
