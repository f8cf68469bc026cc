"""Which versions of resources were seen already."""

from array import array
from collections.abc import Hashable

_WORD = 0xFFFF_FFFF_FFFF_FFFF


class SeenVersions:
    """A set of 64-bit hashes in one flat table: 12 to 24 bytes a key, a fifth of what a Python set takes, so that
    a window of a million resources costs 16 MB and no order of the server's answers has to be trusted.

    Two keys among a million share a hash once in 30 million sets.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 12))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, key: Hashable) -> bool:
        """Remember a key; True if it is new."""
        if not self._place(hash(key) & _WORD or 1):
            return False
        self._size += 1
        if self._size * 3 > len(self._slots) * 2:
            self._grow()
        return True

    def _place(self, word: int) -> bool:
        slots = self._slots
        mask = len(slots) - 1
        at = word & mask
        while held := slots[at]:
            if held == word:
                return False
            at = (at + 1) & mask
        slots[at] = word
        return True

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        for word in old:
            if word:
                self._place(word)
