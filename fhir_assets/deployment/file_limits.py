"""The limits of the files that others put into a folder, a bucket or the landing zone."""

from fhir_assets.fhir.lines import FileLimits
from fhir_assets.settings import Settings


def build_file_limits(settings: Settings) -> FileLimits:
    """Return the limits of FHIR_FILE_BYTES and FHIR_FILE_RATIO."""
    return FileLimits(settings.fhir_file_bytes, settings.fhir_file_ratio, "FHIR_FILE_BYTES", "FHIR_FILE_RATIO")
