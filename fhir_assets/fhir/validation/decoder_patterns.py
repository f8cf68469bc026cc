"""Formats of primitive types as regular expressions, for the decoders and checks of the fast path.

Each pattern accepts only values that the check in ``primitives`` accepts.
"""

import re

_DAY = (
    r"(?!0000)(?:[0-9]{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)"
    r"|(?:0[13578]|1[02])-31)|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]+)?"
_ZONE = r"(?:Z|[+-](?:(?:0[0-9]|1[0-3]):[0-5][0-9]|14:00))"
_MONTH = r"(?!0000)[0-9]{4}(?:-(?:0[1-9]|1[0-2]))?"

ID = r"[A-Za-z0-9\-.]{1,64}"

PATTERNS = {
    "Element.id": r"[^\s\x00-\x1f]+",
    "dateTime": rf"{_DAY}(?:T{_CLOCK}{_ZONE})?|{_MONTH}",
    "id": ID,
    "instant": rf"{_DAY}T{_CLOCK}{_ZONE}",
    "oid": r"urn:oid:[0-2](?:\.(?:0|[1-9][0-9]*))+",
    "time": _CLOCK,
    "uuid": r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}
"""The pattern of the values of each primitive type."""

TYPES_CHECKED_BY_DECODER = ("Element.id", "oid", "time", "uuid")
"""Types that few resources use. The decoder itself checks their patterns, at no cost for resources without them."""

RARE_ELEMENT_PATTERNS = {"code": r"[^\s\x00-\x1f]+", "uri": r"[^\s\x00-\x1f]+"}
"""The patterns by which the decoder checks the rare elements ``implicitRules`` and ``language``, by type."""


def anchor_pattern(pattern: str) -> str:
    """Return the pattern anchored at both ends, because the decoder searches instead of matching."""
    return rf"\A(?:{pattern})\Z"


def compile_literal_reference(types: frozenset[str]) -> re.Pattern[str]:
    """Return the compiled pattern of ``Type/id`` with one of the types."""
    return re.compile(rf"(?:{'|'.join(sorted(types))})/{ID}")
