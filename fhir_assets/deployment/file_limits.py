"""The limits of the files that others put into a folder, a bucket or the landing zone."""

from fhir_assets.fhir.lines import FileLimits
from fhir_assets.settings import Settings


def build_file_limits(settings: Settings) -> FileLimits:
    """Return the limits of FHIR_FILE_BYTES, FHIR_FILE_RATIO and FHIR_FILE_DEAD_LETTERS."""
    return FileLimits(
        settings.fhir_file_bytes,
        settings.fhir_file_ratio,
        "FHIR_FILE_BYTES",
        "FHIR_FILE_RATIO",
        settings.fhir_file_dead_letters,
        "FHIR_FILE_DEAD_LETTERS",
    )
