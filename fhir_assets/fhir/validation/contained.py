"""What one check of the fast path carries along: the contained resources, and which of them are referred to."""

from collections.abc import Callable

import msgspec


class _Head(msgspec.Struct):
    resourceType: str  # noqa: N815
    id: str


_head = msgspec.json.Decoder(_Head)


class ContainedScope:
    """One for each resource that contains others; a single one serves all that do not.

    ``accept`` runs the fast path on the bytes of a contained resource, given this scope.
    """

    __slots__ = ("_accept", "_types", "_used")

    def __init__(self, accept: "Callable[[msgspec.Raw, ContainedScope], bool]") -> None:
        self._accept = accept
        self._types: dict[str, str] = {}
        self._used: set[str] = set()

    def announce(self, contained: list[msgspec.Raw]) -> bool:
        """Reads ids and types of what is contained, before any reference is followed."""
        for item in contained:
            head = _head.decode(item)
            if head.id in self._types:
                return False
            self._types[head.id] = head.resourceType
        return True

    def contained(self, body: msgspec.Raw) -> bool:
        """Is a contained resource surely good?"""
        return self._accept(body, self)

    def use(self, reference: str) -> str | None:
        """The type of the contained resource that ``#id`` names, None if there is none."""
        found = self._types.get(reference[1:])
        if found is not None:
            self._used.add(reference[1:])
        return found

    def all_used(self) -> bool:
        """Is each contained resource referred to (dom-3)?"""
        return len(self._used) == len(self._types)
