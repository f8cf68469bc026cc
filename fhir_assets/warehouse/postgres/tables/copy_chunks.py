"""Chunks: the resources that one COPY writes, composed of the blocks of several batches.

The texts of a block are reused unchanged if all of its resources are written. Otherwise ``select`` builds a new block,
for example without the resources of which a newer version is stored.
"""

from collections.abc import Container, Sequence
from functools import cached_property
from typing import NamedTuple

from fhir_assets.storage.manifest import Arrival
from fhir_assets.warehouse.postgres.tables.copy_blocks import CopyBlock


class PartitionBlock(NamedTuple):
    """Encoded resources of one partition.

    ``lines`` and ``arrivals`` are those of the whole batch as received, for dead letters.
    """

    block: CopyBlock
    partition_key: str
    lines: Sequence[bytes]
    arrivals: Sequence[Arrival] = ()

    def select(self, indexes: Sequence[int]) -> "PartitionBlock":
        """Return the resources with these indexes, which must be ascending and distinct."""
        return self._replace(block=self.block.select(indexes)) if len(indexes) < len(self.block) else self


class CopyChunk:
    """Resources that are written together. No two of them have the same id."""

    def __init__(self, blocks: Sequence[PartitionBlock]) -> None:
        self.blocks = [block for block in blocks if len(block.block)]
        self.ids = [resource_id for block in self.blocks for resource_id in block.block.ids]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def resource_lines(self) -> bytes:
        """The lines for ``fhir.resource``."""
        return b"".join([block.block.resource_lines.text for block in self.blocks])

    @cached_property
    def view_lines(self) -> list[bytes]:
        """The lines for the table of each view; an empty list if the chunk has no resources."""
        by_view = zip(*[block.block.view_lines for block in self.blocks], strict=True)
        return [b"".join([texts.text for texts in texts_of_view]) for texts_of_view in by_view]

    def select_ids(self, ids: Container[str]) -> "CopyChunk":
        """Return the resources whose id is in ``ids``."""
        blocks = [
            block.select([n for n, resource_id in enumerate(block.block.ids) if resource_id in ids])
            for block in self.blocks
        ]
        return CopyChunk(blocks) if any(new is not old for new, old in zip(blocks, self.blocks, strict=True)) else self

    def split(self) -> tuple["CopyChunk", "CopyChunk"]:
        """Return the first half and the second half of the resources."""
        middle = len(self) // 2
        return self.select_ids(frozenset(self.ids[:middle])), self.select_ids(frozenset(self.ids[middle:]))


EMPTY_CHUNK = CopyChunk(())


def split_versions(blocks: Sequence[PartitionBlock]) -> list[list[PartitionBlock]]:
    """Return one or two lists of blocks, to be written one after the other. No id occurs twice in a list.

    For each resource, the newest dated version and the newest undated version are kept, or the last of several equal
    versions. If a resource has both a dated and an undated version, the one that was added first is in the first list.
    The write of the second list then decides which of them is newer.
    """
    newest: dict[tuple[str, int], tuple[float, int, int, int]] = {}
    for b, partition_block in enumerate(blocks):
        block = partition_block.block
        for n, key in enumerate(zip(block.ids, block.dated, strict=True)):
            version = (block.timestamps[n], block.version_numbers[n], b, n)
            if key not in newest or version > newest[key]:
                newest[key] = version
    selected: tuple[list[list[int]], list[list[int]]] = ([[] for _ in blocks], [[] for _ in blocks])
    for (resource_id, dated), (_, _, b, n) in newest.items():
        other = newest.get((resource_id, not dated))
        selected[other is not None and other[2:] < (b, n)][b].append(n)
    lists = [
        [block.select(sorted(indexes)) for block, indexes in zip(blocks, by_block, strict=True)]
        for by_block in selected
    ]
    return lists if any(selected[1]) else lists[:1]
