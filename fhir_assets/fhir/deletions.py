"""Deletions in Bundles: the deleted resource, the version of the deletion, and its time.

A history represents a deletion as an entry with the method DELETE and the time in ``response.lastModified``
(https://hl7.org/fhir/R4/http.html#history). Servers deviate from that: HAPI gives no time and appends the version to
the URL, Azure gives an absolute URL with a version and a resource, LinuxForHealth gives the version in
``response.location``, and Medplum gives the method GET with status 410. This module reads all of them, for histories
that are requested, landed Bundles and the ``deleted`` files of bulk exports.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from fhir_assets.fhir.model import UNKNOWN_TYPE, known_resource_type
from fhir_assets.fhir.record import Deletion, parse_instant
from fhir_assets.fhir.seen_versions import SeenVersions

MAX_PENDING = 10_000
"""The maximum number of deletions without a time that are held until the next entry with a time."""

_TARGET = re.compile(
    r"(?:^|/)(?P<type>[A-Z][A-Za-z]+)/(?P<id>[A-Za-z0-9\-.]{1,64})"
    r"(?:/_history/(?P<version>[A-Za-z0-9\-._~]{1,64}))?/?$"
)


@dataclass(frozen=True, slots=True)
class Target:
    """The resource that a URL names, and the version if the URL has one."""

    resource_type: str
    id: str
    version_id: str | None = None


class EntryRequest(msgspec.Struct):
    """``Bundle.entry.request``. ``method`` is in upper case; a value that is not text counts as absent."""

    method: Any = ""
    url: Any = ""

    def __post_init__(self) -> None:
        self.method = _text(self.method).upper()
        self.url = _text(self.url)


class EntryResponse(msgspec.Struct, rename="camel"):
    """``Bundle.entry.response``. A value that is not text counts as absent, except for a number as the status."""

    status: Any = ""
    location: Any = ""
    etag: Any = ""
    last_modified: Any = ""
    outcome: msgspec.Raw = msgspec.Raw(b"null")

    def __post_init__(self) -> None:
        self.status = str(self.status) if isinstance(self.status, int) else _text(self.status)
        self.location = _text(self.location)
        self.etag = _text(self.etag)
        self.last_modified = _text(self.last_modified)


class _Meta(msgspec.Struct, rename="camel"):
    version_id: str | None = None
    last_updated: str | None = None


class EntryResource(msgspec.Struct, rename="camel"):
    """The part of ``Bundle.entry.resource`` that identifies a version."""

    resource_type: str | None = None
    id: str | None = None
    meta: _Meta | None = None


class HistoryEntry(msgspec.Struct, rename="camel"):
    """An entry of a Bundle, without the content of its resource."""

    full_url: str | None = None
    resource: EntryResource | None = None
    request: EntryRequest | None = None
    response: EntryResponse | None = None

    @property
    def is_deletion(self) -> bool:
        """Whether the entry represents or requests a deletion."""
        return is_deletion(self.request, self.response)

    @property
    def target(self) -> Target | None:
        """The resource of the entry, None if it does not refer to a single resource."""
        urls = (
            self.request.url if self.request else None,
            self.response.location if self.response else None,
            self.full_url,
        )
        targets = [target for url in urls if url and (target := parse_target(url))]
        if targets:
            version = next((target.version_id for target in targets if target.version_id), None)
            return Target(targets[0].resource_type, targets[0].id, self._version_id or version)
        if self.resource is not None and self.resource.id and self.resource.resource_type:
            return Target(self.resource.resource_type, self.resource.id, self._version_id)
        return None

    @property
    def moment(self) -> datetime | None:
        """The time of the version or deletion, None if the entry has none."""
        response_time = parse_instant(self.response.last_modified) if self.response else None
        meta = self.resource.meta if self.resource else None
        return response_time or (parse_instant(meta.last_updated) if meta else None)

    @property
    def _version_id(self) -> str | None:
        etag = parse_etag(self.response.etag) if self.response else None
        meta = self.resource.meta if self.resource else None
        return etag or (meta.version_id if meta else None)


def is_deletion(request: EntryRequest | None, response: EntryResponse | None) -> bool:
    """Return whether the entry with this request and response represents or requests a deletion."""
    if request is None:
        return False
    return request.method == "DELETE" or (response is not None and response.status.startswith("410"))


def parse_target(url: str) -> Target | None:
    """Return the resource in ``[base/]<type>/<id>[/_history/<version>]``.

    Return None for any other URL, such as a conditional one, and for types that R4 does not define.
    """
    match = None if "?" in url else _TARGET.search(url.split("#")[0])
    if match is None or known_resource_type(match["type"]) == UNKNOWN_TYPE:
        return None
    return Target(match["type"], match["id"], match["version"])


def parse_etag(etag: str | None) -> str | None:
    """Return the version in an ETag, ``W/"3"`` or ``3``; None if it is absent or empty."""
    return (etag or "").strip().removeprefix("W/").strip('"') or None


class DeletionTimes:
    """Determines the times of the deletions in a history, whose entries are added in order, newest first.

    A deletion without a time took place between the neighbouring entries. It gets the time of the newer neighbour, or
    ``latest`` if that is earlier or if there is no newer neighbour, but never a time before that of the older
    neighbour. It is therefore newer than every earlier version of its resource, and not newer than a later one. If a
    newer version of the resource exists, the deletion is left out.

    ``latest`` is a time that is not after the end of the history, None if it is unknown; ``fallback`` is the time of a
    deletion in a history without any other time.
    """

    def __init__(self, *, latest: datetime | None, fallback: datetime) -> None:
        self._latest = latest
        self._fallback = fallback
        self._newer: datetime | None = None
        self._pending: list[Target] = []
        self._newer_versions = SeenVersions()

    def add_version(self, target: Target | None, moment: datetime | None) -> Iterator[Deletion]:
        """Add a version that is not a deletion, and yield the deletions whose time is now known."""
        if target is not None:
            self._newer_versions.add((target.resource_type, target.id))
            if self._pending:
                self._pending = [waiting for waiting in self._pending if not _follows(target, waiting)]
        if moment is not None:
            yield from self._resolve(moment)

    def add_deletion(self, target: Target, moment: datetime | None) -> Iterator[Deletion]:
        """Add a deletion, and yield the deletions whose time is now known."""
        is_current = (target.resource_type, target.id) not in self._newer_versions
        if moment is not None:
            yield from self._resolve(moment)
            if is_current:
                yield Deletion(target.resource_type, target.id, moment, target.version_id)
        elif is_current:
            self._pending.append(target)
            if len(self._pending) >= MAX_PENDING:
                yield from self.finish()

    def finish(self, fallback: datetime | None = None) -> Iterator[Deletion]:
        """Yield the deletions that have no older neighbour. ``fallback`` replaces that of the constructor."""
        self._fallback = fallback or self._fallback
        yield from self._yield_pending(self._bound(None))

    def _resolve(self, older: datetime) -> Iterator[Deletion]:
        """Yield the pending deletions, whose older neighbour has the time ``older``."""
        yield from self._yield_pending(self._bound(older))
        self._newer = older

    def _yield_pending(self, moment: datetime) -> Iterator[Deletion]:
        for target in self._pending:
            yield Deletion(target.resource_type, target.id, moment, target.version_id)
        self._pending.clear()

    def _bound(self, older: datetime | None) -> datetime:
        if self._newer is not None and older is not None and older > self._newer:
            return self._newer  # oldest first: the entry before the deletion is the older neighbour
        upper = min(filter(None, (self._newer, self._latest)), default=None)
        return max(filter(None, (upper, older)), default=self._fallback)


def read_deleted_entries(line: bytes, at: datetime) -> Iterator[Deletion | None]:
    """Yield the deletions in one line of a ``deleted`` file of a bulk export, a Bundle of type transaction.

    A deletion without a time gets that of the Bundle, else ``at``. Yield None for a deletion that names no resource,
    and for a line that is not a Bundle.
    """
    try:
        bundle = _decode_bundle(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        yield None
        return
    if bundle.resource_type != "Bundle":
        yield None
        return
    bundle_time = parse_instant(bundle.meta.last_updated) if bundle.meta else None
    for entry in bundle.entry or ():
        if entry is not None and entry.is_deletion:
            target = entry.target
            moment = entry.moment or bundle_time or at
            yield Deletion(target.resource_type, target.id, moment, target.version_id) if target else None


class _DeletedBundle(msgspec.Struct, rename="camel"):
    resource_type: str = ""
    meta: _Meta | None = None
    entry: list[HistoryEntry | None] | None = None


_decode_bundle = msgspec.json.Decoder(_DeletedBundle).decode


def _follows(version: Target, deletion: Target) -> bool:
    """Return whether a version of the deleted resource has a greater number than the deletion."""
    if (version.resource_type, version.id) != (deletion.resource_type, deletion.id):
        return False
    numbers = (version.version_id or "", deletion.version_id or "")
    return all(number.isascii() and number.isdigit() for number in numbers) and int(numbers[0]) > int(numbers[1])


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
