"""The landing zone of a deployment, and the receiver of resources from other channels than its source."""

from functools import partial

from fhir_assets.deployment.encryption import build_store_cipher
from fhir_assets.deployment.file_limits import build_file_limits
from fhir_assets.deployment.sources import build_binding
from fhir_assets.deployment.store import build_bucket, build_store
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.pipeline.landing.step import LandingStep
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.settings import Settings
from fhir_assets.storage.landing_zone import EncryptedZone, Zone, open_zone


def build_receiver(settings: Settings, warehouse: Warehouse) -> Receiver:
    """Return the receiver that writes resources to ``raw`` in the store of the deployment."""
    store = build_store(settings)
    return Receiver(
        store,
        warehouse.connect,
        settings.window_scheme,
        settings.fhir_resource_types,
        check=build_binding(settings, warehouse, store).require,
        now=warehouse.now,
    )


def build_landing_zone(settings: Settings) -> Zone:
    """Return the zone at FHIR_LANDING_URL; nothing is read. Raises ConfigurationError if it is unset."""
    if not settings.fhir_landing_url:
        raise ConfigurationError(
            "FHIR_LANDING_URL is not set: set it to a folder or s3://bucket/prefix that files are put into, in the "
            "environment or in .env"
        )
    return EncryptedZone(
        open_zone(settings.fhir_landing_url, bucket=partial(build_bucket, settings)), build_store_cipher(settings)
    )


def build_landing_step(settings: Settings, warehouse: Warehouse) -> LandingStep:
    """Return the step that receives files of the landing zone. Raises ConfigurationError."""
    return LandingStep(
        build_landing_zone(settings),
        build_receiver(settings, warehouse),
        warehouse.connect,
        max_bytes=settings.validation_max_bytes,
        max_values=settings.validation_max_values,
        file_limits=build_file_limits(settings),
        now=warehouse.now,
    )
