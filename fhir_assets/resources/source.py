"""The source of a deployment, as FHIR_SOURCE names it."""

from fhir_assets.fhir.record import Source
from fhir_assets.settings import Settings, SourceKind


def open_source(settings: Settings) -> Source:
    """A Source of the settings. Raises ConfigurationError; calls nothing yet."""
    url = settings.require_source()
    if settings.fhir_source is SourceKind.NDJSON:
        return NdjsonSource(url)
    return SearchSource(FhirClient())
