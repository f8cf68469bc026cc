"""The parameters of a bulk export and the manifest that lists its files
(https://hl7.org/fhir/uv/bulkdata/STU2/export.html#response---complete-status).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from fhir_assets.errors import NotFhir
from fhir_assets.fhir.record import parse_instant

_ADVICE = "run again to request a new export, and ask the server's administrator if it happens again"
_has_unstorable = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]").search
_is_type_name = re.compile(r"[A-Za-z]{1,64}").fullmatch


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
    """The files of a finished export, which holds every resource updated before ``transaction_time``.

    ``answered_at`` is the ``Date`` of the response with the manifest, and ``next_url`` the address of the next part of
    the manifest; both are None once the manifest is stored.
    """

    transaction_time: datetime
    needs_token: bool
    output: tuple[ExportFile, ...]
    deleted: tuple[ExportFile, ...] = ()
    errors: tuple[ExportFile, ...] = ()
    answered_at: datetime | None = None
    next_url: str | None = None

    @property
    def size(self) -> int:
        """The number of characters of the addresses of all files."""
        return sum(len(file.url) for file in (*self.output, *self.deleted, *self.errors))

    def extend(self, following: "ExportManifest") -> "ExportManifest":
        """Return the manifest with the files of the next part, which is complete up to the earlier of both times."""
        return replace(
            following,
            transaction_time=min(self.transaction_time, following.transaction_time),
            output=self.output + following.output,
            deleted=self.deleted + following.deleted,
            errors=self.errors + following.errors,
        )


def parse_manifest(document: Any, url: str, answered_at: datetime | None = None) -> ExportManifest:
    """Parse the manifest that a server sends from ``url``. Raises NotFhir for any other JSON.

    The manifest itself is read leniently: an absent or empty list of files has no files. A file that is listed twice is
    one file.
    """
    try:
        return ExportManifest(
            _parse_transaction_time(document),
            document.get("requiresAccessToken") in (True, "true"),
            _parse_files(document.get("output"), url, None),
            _parse_files(document.get("deleted"), url, "Bundle"),
            _parse_files(document.get("error"), url, "OperationOutcome"),
            answered_at,
            _find_next_link(document, url),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise NotFhir(f"the server's answer to the export is not a Bulk Data manifest: {_ADVICE}") from None


def _parse_transaction_time(document: Any) -> datetime:
    moment = parse_instant(document["transactionTime"])
    if moment is None:
        raise NotFhir(
            "the transactionTime of the export is not an instant with a time zone, so that the server's answer is not "
            f"a Bulk Data manifest: {_ADVICE}"
        )
    return moment


def _find_next_link(document: Any, url: str) -> str | None:
    links = [link["url"] for link in document.get("link") or () if link.get("relation") == "next"]
    return urljoin(url, links[0]) if links else None


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


def _parse_files(entries: list[dict[str, Any]] | None, url: str, default_type: str | None) -> tuple[ExportFile, ...]:
    if entries is not None and not isinstance(entries, list):
        raise TypeError
    files: dict[tuple[str, str], ExportFile] = {}
    for entry in entries or ():
        resource_type: Any = entry.get("type") or default_type
        file = ExportFile(resource_type, urljoin(url, entry["url"]), _parse_count(entry.get("count")))
        if not isinstance(resource_type, str) or not _is_type_name(resource_type):
            raise ValueError
        if urlsplit(file.url).scheme not in ("http", "https") or _has_unstorable(file.url):
            raise ValueError
        files.setdefault((resource_type, file.url), file)
    return tuple(files.values())


def _parse_count(count: object) -> int | None:
    if count is None or isinstance(count, bool):
        return None
    number = int(count) if isinstance(count, str) else count
    if not isinstance(number, int | float) or number != int(number):
        raise ValueError
    return int(number) if number >= 0 else None
