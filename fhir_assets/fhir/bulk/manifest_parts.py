"""The parts of a manifest, which link to each other, and their limits."""

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.bulk.manifest import ExportManifest
from fhir_assets.fhir.client.limits import ClientLimits


class ManifestParts:
    """The parts of one manifest that have been read."""

    def __init__(self, limits: ClientLimits) -> None:
        self._limits = limits
        self._read: set[int] = set()
        self._files = 0
        self._size = 0

    def add(self, url: str, part: ExportManifest) -> None:
        """Count a part. Raises NotFhir if it was read before, or if the manifest exceeds its limits.

        A server may give one part after the other at the same URL.
        """
        content = hash((url, *(file.url for file in part.output)))
        if content in self._read:
            raise NotFhir("the parts of the manifest of an export link to each other in a loop: run again")
        self._read.add(content)
        self._files += len(part.output) + len(part.deleted) + len(part.errors)
        self._limits.check_files(max(self._files, len(self._read)))
        self._size += part.size
        if self._size > self._limits.answer_bytes:
            raise NotFhir(
                f"the manifest of the export is larger than {self._limits.answer_bytes} bytes "
                f"(see {self._limits.labels.answer_bytes})"
            )
