"""The parameters of a bulk export and the manifest that lists its files
(https://hl7.org/fhir/uv/bulkdata/STU2/export.html#response---complete-status).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.record import parse_instant


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """The parameters of an export.

    ``level`` is ``system``, ``patient`` or ``group/<id>``. ``type_filter`` is sent as ``_typeFilter``: searches,
    separated by commas.
    """

    level: str
    resource_types: tuple[str, ...]
    since: datetime | None
    type_filter: str = ""

    def query(self) -> str:
        """Return the query of the kick-off. A comma within a search of ``type_filter`` must be given as %2C."""
        parameters = {
            "_outputFormat": "application/fhir+ndjson",
            "_type": ",".join(self.resource_types),
            "_since": self.since.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            if self.since
            else "",
            "_typeFilter": self.type_filter,
        }
        return "&".join(f"{name}={quote(value, safe=',:$/')}" for name, value in parameters.items() if value)


@dataclass(frozen=True, slots=True)
class ExportFile:
    """A file of a finished export. ``count`` is its number of resources by the manifest, None if it is not given."""

    resource_type: str
    url: str
    count: int | None


@dataclass(frozen=True, slots=True)
class ExportManifest:
    """The files of a finished export, which holds every resource updated before ``transaction_time``."""

    transaction_time: datetime
    needs_token: bool
    output: tuple[ExportFile, ...]
    deleted: tuple[ExportFile, ...] = ()
    errors: tuple[ExportFile, ...] = ()


def parse_manifest(document: Any, url: str) -> ExportManifest:
    """Parse the manifest that a server sends from ``url``. Raises NotFhir for any other JSON."""
    try:
        transaction_time = parse_instant(document["transactionTime"])
        if transaction_time is None:
            raise ValueError
        return ExportManifest(
            transaction_time,
            document.get("requiresAccessToken") is not False,
            _parse_files(document["output"], url),
            *(_parse_files(document.get(name) or [], url) for name in ("deleted", "error")),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise NotFhir(
            "the server's answer to the export is not a Bulk Data manifest: run again to request a new export, and "
            "ask the server's administrator if it happens again"
        ) from None


def manifest_to_json(manifest: ExportManifest) -> dict[str, Any]:
    """Return the manifest as JSON for storage."""

    def to_json(files: Sequence[ExportFile]) -> list[dict[str, Any]]:
        return [{"type": file.resource_type, "url": file.url, "count": file.count} for file in files]

    return {
        "transactionTime": manifest.transaction_time.isoformat(),
        "requiresAccessToken": manifest.needs_token,
        "output": to_json(manifest.output),
        "deleted": to_json(manifest.deleted),
        "error": to_json(manifest.errors),
    }


def manifest_from_json(document: dict[str, Any]) -> ExportManifest:
    """Return the manifest that ``manifest_to_json`` stored."""

    def from_json(name: str) -> tuple[ExportFile, ...]:
        return tuple(ExportFile(file["type"], file["url"], file["count"]) for file in document[name])

    return ExportManifest(
        datetime.fromisoformat(document["transactionTime"]),
        document["requiresAccessToken"],
        from_json("output"),
        from_json("deleted"),
        from_json("error"),
    )


def _parse_files(entries: list[dict[str, Any]], url: str) -> tuple[ExportFile, ...]:
    files = tuple(ExportFile(entry["type"], urljoin(url, entry["url"]), entry.get("count")) for entry in entries)
    for file in files:
        is_named = isinstance(file.resource_type, str) and urlsplit(file.url).scheme in ("http", "https")
        if not is_named or type(file.count) not in (int, type(None)):
            raise ValueError
    return files
