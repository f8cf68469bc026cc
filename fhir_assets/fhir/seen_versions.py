"""A compact set of the resource versions that a search has returned."""

from array import array
from collections.abc import Hashable

_MASK_64 = 0xFFFF_FFFF_FFFF_FFFF


class SeenVersions:
    """A set of 64-bit hashes in one flat hash table.

    A key takes 12 to 24 bytes, a fifth of its size in a Python set: a window of a million resources costs 16 MB. The
    probability that any two of a million keys share a hash is about one in 30 million.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 << 12))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, key: Hashable) -> bool:
        """Add a key. Return True if it is new."""
        if not self._insert(hash(key) & _MASK_64 or 1):
            return False
        self._size += 1
        if self._size * 3 > len(self._slots) * 2:
            self._grow()
        return True

    def __contains__(self, key: Hashable) -> bool:
        word = hash(key) & _MASK_64 or 1
        mask = len(self._slots) - 1
        index = word & mask
        while (stored := self._slots[index]) and stored != word:
            index = (index + 1) & mask
        return stored == word

    def _insert(self, word: int) -> bool:
        """Insert a hash by linear probing; 0 marks a free slot."""
        slots = self._slots
        mask = len(slots) - 1
        index = word & mask
        while stored := slots[index]:
            if stored == word:
                return False
            index = (index + 1) & mask
        slots[index] = word
        return True

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", bytes(16 * len(old)))
        for word in old:
            if word:
                self._insert(word)
