"""Chunks: the resources that one COPY writes, composed of the blocks of several batches.

The texts of a block are reused unchanged if all of its resources are written. Otherwise ``select`` builds a new block,
for instance without the resources of which a newer version is stored.
"""

from collections.abc import Container, Sequence
from functools import cached_property
from typing import NamedTuple

from fhir_assets.warehouse.postgres.tables.copy_blocks import CopyBlock


class PartitionBlock(NamedTuple):
    """Encoded resources of one partition, with all lines of their batch as received, for dead letters."""

    block: CopyBlock
    partition_key: str
    lines: Sequence[bytes]

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


def keep_newest(blocks: Sequence[PartitionBlock]) -> list[PartitionBlock]:
    """Return blocks with only the newest version of each resource; of equal versions, the last one."""
    newest: dict[str, tuple[float, int, int, int]] = {}
    for b, partition_block in enumerate(blocks):
        block = partition_block.block
        for n, resource_id in enumerate(block.ids):
            version = (block.timestamps[n], block.version_numbers[n], b, n)
            if resource_id not in newest or version > newest[resource_id]:
                newest[resource_id] = version
    selected: list[list[int]] = [[] for _ in blocks]
    for _, _, b, n in newest.values():
        selected[b].append(n)
    return [block.select(sorted(indexes)) for block, indexes in zip(blocks, selected, strict=True)]
