"""What one check of the fast path carries along: the contained resources, and which of them are referred to."""

from collections.abc import Callable
from typing import Any

import msgspec


class _Head(msgspec.Struct):
    resourceType: str  # noqa: N815
    id: str


_head = msgspec.json.Decoder(_Head)


class FastScope:
    """One for each resource that is not contained. ``accept`` runs the fast path on the bytes of another resource."""

    __slots__ = ("_accept", "_types", "_used", "own_type")

    def __init__(self, own_type: str, accept: Callable[[Any, "FastScope | None"], bool]) -> None:
        self.own_type = own_type
        self._accept = accept
        self._types: dict[str, str] | None = None
        self._used: set[str] = set()

    def announce(self, contained: list[msgspec.Raw]) -> bool:
        """Reads ids and types of what is contained, before any reference is followed."""
        self._types = {}
        for item in contained:
            try:
                head = _head.decode(item)
            except msgspec.MsgspecError:
                return False
            if head.id in self._types:
                return False
            self._types[head.id] = head.resourceType
        return True

    def contained(self, body: msgspec.Raw) -> bool:
        """Is a contained resource surely good?"""
        return self._accept(body, self)

    def inner(self, body: msgspec.Raw) -> bool:
        """Is a resource in its own right (in a Bundle's entry) surely good?"""
        return self._accept(body, None)

    def use(self, reference: str) -> str | None:
        """The type of the contained resource that ``#id`` names, None if there is none."""
        found = None if self._types is None else self._types.get(reference[1:])
        if found is not None:
            self._used.add(reference[1:])
        return found

    def all_used(self, _contained: object) -> bool:
        """Is each contained resource referred to (dom-3)?"""
        return self._types is not None and len(self._used) == len(self._types)
