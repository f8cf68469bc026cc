"""The limits of what the servers of a deployment may send."""

from fhir_assets.fhir.client.limits import ClientLimits
from fhir_assets.fhir.labels import ServerLabels
from fhir_assets.settings import Settings


def build_client_limits(settings: Settings, labels: ServerLabels) -> ClientLimits:
    """Return the limits for a FHIR server. ``labels`` are the names of its settings in messages."""
    return ClientLimits(
        labels,
        timeout=settings.fhir_timeout_seconds,
        answer_seconds=settings.fhir_answer_seconds,
        answer_bytes=settings.fhir_answer_bytes,
        max_pages=settings.fhir_max_pages,
        file_seconds=settings.fhir_bulk_file_seconds,
        file_bytes=settings.fhir_bulk_file_bytes,
        max_files=settings.fhir_bulk_max_files,
        line_bytes=settings.validation_max_bytes,
    )
