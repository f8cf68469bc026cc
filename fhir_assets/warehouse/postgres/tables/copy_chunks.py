"""What is written to the tables at once: blocks of several batches, cut apart only where not all of them win."""

from collections.abc import Container, Sequence
from functools import cached_property
from typing import NamedTuple

from fhir_assets.warehouse.postgres.tables.copy_blocks import CopyBlock


class Piece(NamedTuple):
    """Resources of one partition in a chunk, and the lines of their batch: what a dead letter would need."""

    block: CopyBlock
    partition_key: str
    lines: Sequence[bytes]

    def pick(self, numbers: Sequence[int]) -> "Piece":
        """Some of them."""
        return self._replace(block=self.block.pick(numbers)) if len(numbers) < len(self.block) else self


class Chunk:
    """Resources that are written together, no two of them with the same id."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = [piece for piece in pieces if len(piece.block)]
        self.ids = [key for piece in self.pieces for key in piece.block.ids]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def heads(self) -> bytes:
        """The lines of ``fhir.resource``."""
        return b"".join([piece.block.heads.text for piece in self.pieces])

    @cached_property
    def rows(self) -> list[bytes]:
        """The lines of each view; nothing if there are no resources."""
        by_view = zip(*[piece.block.rows for piece in self.pieces], strict=True)
        return [b"".join([texts.text for texts in of_view]) for of_view in by_view]

    def only(self, ids: Container[str]) -> "Chunk":
        """Those of its resources that have one of these ids."""
        pieces = [piece.pick([n for n, key in enumerate(piece.block.ids) if key in ids]) for piece in self.pieces]
        return Chunk(pieces) if any(new is not old for new, old in zip(pieces, self.pieces, strict=True)) else self

    def halves(self) -> tuple["Chunk", "Chunk"]:
        """The first half of its resources, and the second."""
        middle = len(self) // 2
        return self.only(frozenset(self.ids[:middle])), self.only(frozenset(self.ids[middle:]))


NOTHING = Chunk(())


def newest(pieces: Sequence[Piece]) -> list[Piece]:
    """Of resources with the same id the newest version; of equals the one that came last."""
    best: dict[str, tuple[float, int, int, int]] = {}
    for p, piece in enumerate(pieces):
        block = piece.block
        for n, key in enumerate(block.ids):
            version = (block.moments[n], block.numbers[n], p, n)
            if key not in best or version > best[key]:
                best[key] = version
    chosen: list[list[int]] = [[] for _ in pieces]
    for _, _, p, n in best.values():
        chosen[p].append(n)
    return [piece.pick(sorted(numbers)) for piece, numbers in zip(pieces, chosen, strict=True)]
