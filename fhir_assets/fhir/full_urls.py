"""The references between the entries of one Bundle, resolved by ``fullUrl``
(https://hl7.org/fhir/R4/bundle.html#references).

A reference to the ``fullUrl`` of an entry becomes ``Type/id``, the form in which a resource refers to another one of
the same server. All other bytes of a resource are unchanged.
"""

import re
from uuid import UUID

import msgspec

_RESTFUL = re.compile(r"(https?://.+)/([A-Z][A-Za-z]+)/([A-Za-z0-9.\-]{1,64})(?:/_history/[^/]+)?")
_RELATIVE = re.compile(r"([A-Z][A-Za-z]+)/([A-Za-z0-9.\-]{1,64})(?:/_history/[^/]+)?")
_UUID = re.compile(r"urn:uuid:([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})")
_URN_ID = re.compile(r"urn:(?:uuid|oid):([A-Za-z0-9.\-]{1,64})")
_REFERENCE = re.compile(
    rb'("reference"\s*:\s*)("(?:urn:|https?:)(?:[^"\\]|\\.)*")|("url"\s*:\s*)("urn:(?:[^"\\]|\\.)*")'
)
_parse_text = msgspec.json.Decoder(str).decode
_AMBIGUOUS = ""


def derive_id(full_url: str | None, request_url: str | None = None) -> str | None:
    """Return the id for a resource without one: from its ``fullUrl``, else from the URL of a PUT; None if neither
    contains an id. The same entry always gets the same id.
    """
    if full_url:
        if match := _UUID.fullmatch(full_url):
            return match[1].lower()
        if match := _URN_ID.fullmatch(full_url):
            return match[1]
        if match := _RESTFUL.fullmatch(full_url):
            return match[3]
    for url in (full_url, request_url):
        if url and (match := _RELATIVE.fullmatch(url.strip("/"))):
            return match[2]
    return None


class FullUrls:
    """The full URLs of the entries of one Bundle.

    A ``urn:uuid`` that is also the id of its resource, the most frequent case in large Bundles, takes 15 bytes of
    memory. A full URL such as ``https://server/base/Patient/1`` takes none: only its base is kept.
    """

    def __init__(self) -> None:
        self._bases: set[str] = set()
        self._uuids = _UuidTypes()
        self._targets: dict[str, str] = {}

    def add(self, full_url: str, resource_type: str, resource_id: str) -> None:
        """Add the full URL of an entry and the type and id of its resource."""
        restful = _RESTFUL.fullmatch(full_url)
        if restful and restful[2] == resource_type and restful[3] == resource_id:
            self._bases.add(restful[1])
            return
        uuid = _UUID.fullmatch(full_url)
        if uuid and uuid[1].lower() == resource_id and self._uuids.add(UUID(resource_id).bytes, resource_type):
            return
        target = f"{resource_type}/{resource_id}"
        key = full_url.lower() if uuid else full_url
        if self._targets.setdefault(key, target) != target:
            self._targets[key] = _AMBIGUOUS

    def find(self, reference: str) -> str | None:
        """Return the relative reference to the entry that an absolute one refers to; None if it is not known.

        A reference to a resource below the base of an entry is relative to the same server, even if the Bundle does not
        contain the resource.
        """
        if uuid := _UUID.fullmatch(reference):
            if resource_type := self._uuids.find(UUID(uuid[1]).bytes):
                return f"{resource_type}/{uuid[1].lower()}"
            return self._targets.get(reference.lower()) or None
        if target := self._targets.get(reference.split("/_history/", 1)[0]):
            return target
        restful = _RESTFUL.fullmatch(reference)
        return reference[len(restful[1]) + 1 :] if restful and restful[1] in self._bases else None

    def resolve(self, body: bytes) -> tuple[bytes, bool]:
        """Return a resource whose references to entries are relative, and whether an absolute one remains.

        Attachments that refer to an entry by ``url`` are resolved too.
        """
        unknown = False

        def replace(match: re.Match[bytes]) -> bytes:
            nonlocal unknown
            try:
                target = self.find(_parse_text(match[2] or match[4]))
            except (msgspec.DecodeError, UnicodeDecodeError):
                target = None
            if target is None:
                unknown = unknown or match[1] is not None
                return match[0]
            return (match[1] or match[3]) + msgspec.json.encode(target)

        if b"urn:" not in body and b'"http' not in body:
            return body, False
        return _REFERENCE.sub(replace, body), unknown


class _UuidTypes:
    """Resource types by UUID, in buckets of 15-byte records: 14 bytes of the UUID and the number of the type."""

    def __init__(self) -> None:
        self._types: list[str] = []
        self._buckets: dict[bytes, bytearray] = {}

    def add(self, uuid: bytes, resource_type: str) -> bool:
        """Add a UUID. Return False if it has another type already, or if there are too many types."""
        if known := self.find(uuid):
            return known == resource_type
        if resource_type not in self._types:
            if len(self._types) > 255:
                return False
            self._types.append(resource_type)
        self._buckets.setdefault(uuid[:2], bytearray()).extend(uuid[2:] + bytes([self._types.index(resource_type)]))
        return True

    def find(self, uuid: bytes) -> str | None:
        """Return the type of a UUID, or None."""
        bucket = self._buckets.get(uuid[:2], b"")
        start = bucket.find(uuid[2:])
        while start % 15 > 0:  # a match that spans two records, or -1, whose remainder is 14
            if start < 0:
                return None
            start = bucket.find(uuid[2:], start + 1)
        return self._types[bucket[start + 14]]
