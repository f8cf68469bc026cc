"""The contained resources of a resource that the fast path checks, and the references to them."""

from collections.abc import Callable

import msgspec


class _Head(msgspec.Struct, rename="camel"):
    resource_type: str
    id: str


_head = msgspec.json.Decoder(_Head)


class ContainedScope:
    """The contained resources of one resource, and which of them are referred to.

    Each resource with contained resources gets its own scope; all other resources share one. ``accept`` runs the fast
    path on the bytes of a contained resource with this scope.
    """

    __slots__ = ("_accept", "_types", "_used")

    def __init__(self, accept: "Callable[[msgspec.Raw, ContainedScope], bool]") -> None:
        self._accept = accept
        self._types: dict[str, str] = {}
        self._used: set[str] = set()

    def register(self, contained: list[msgspec.Raw]) -> bool:
        """Record the ids and types of the contained resources; return False if an id is duplicated.

        Must be called before references are checked.
        """
        for item in contained:
            head = _head.decode(item)
            if head.id in self._types:
                return False
            self._types[head.id] = head.resource_type
        return True

    def accepts(self, body: msgspec.Raw) -> bool:
        """Return True if a contained resource has no issue."""
        return self._accept(body, self)

    def use(self, reference: str) -> str | None:
        """Mark the contained resource that ``#id`` refers to as used. Return its type, or None if there is none."""
        resource_type = self._types.get(reference[1:])
        if resource_type is not None:
            self._used.add(reference[1:])
        return resource_type

    def all_used(self) -> bool:
        """Return True if each contained resource is referred to (invariant dom-3)."""
        return len(self._used) == len(self._types)
