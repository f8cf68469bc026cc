"""Chunks of COPY blocks: after blocks are taken apart and joined, each resource still has its own lines."""

from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.warehouse.postgres.tables.copy_blocks import CopyBlock, EncodedResource
from fhir_assets.warehouse.postgres.tables.copy_chunks import EMPTY_CHUNK, CopyChunk, PartitionBlock, split_versions

Resource = tuple[str, int]
"""An id and a version."""

RESOURCES = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3)), max_size=8)


def encode(resource_id: str, version: int) -> EncodedResource:
    view_lines = [f"{resource_id}{version}\n" * (version % 3), ""]
    return EncodedResource(
        resource_id, 1.0, version, True, f"{resource_id}\t{version}\n".encode(), [text.encode() for text in view_lines]
    )


def build_block(resources: list[Resource]) -> PartitionBlock:
    block = CopyBlock.build([(n, encode(*resource)) for n, resource in enumerate(resources)], 2)
    return PartitionBlock(block, "w", [f"{resource_id}{version}".encode() for resource_id, version in resources])


def read_blocks(blocks: list[PartitionBlock]) -> list[Resource]:
    """Return the resources of blocks. Fails if the lines of a resource belong to another one."""
    resources = []
    for block, _, lines, _ in blocks:
        for n, resource_id in enumerate(block.ids):
            version = block.version_numbers[n]
            encoded = encode(resource_id, version)
            assert block.resource_lines.select([n]).text == encoded.resource_line
            assert [texts.select([n]).text for texts in block.view_lines] == encoded.view_lines
            assert lines[block.line_numbers[n]] == f"{resource_id}{version}".encode()
            resources.append((resource_id, version))
    return resources


@given(st.lists(RESOURCES, max_size=5))
def test_the_newest_version_of_each_resource_is_kept_and_of_equal_versions_the_last(
    batches: list[list[Resource]],
) -> None:
    newest: dict[str, tuple[int, int, int]] = {}
    for batch_number, batch in enumerate(batches):
        for n, (resource_id, version) in enumerate(batch):
            newest[resource_id] = max(newest.get(resource_id, (-1, 0, 0)), (version, batch_number, n))
    in_order = sorted(newest.items(), key=lambda item: item[1][1:])
    (kept,) = split_versions([build_block(batch) for batch in batches])
    assert read_blocks(kept) == [(resource_id, version) for resource_id, (version, _, _) in in_order]
    assert len(CopyChunk(kept)) == len(newest)


@given(st.lists(RESOURCES, max_size=5), st.sets(st.sampled_from("abcdefgh")))
def test_a_chunk_that_is_taken_apart_has_the_lines_of_the_remaining_resources(
    batches: list[list[Resource]], ids: set[str]
) -> None:
    (kept,) = split_versions([build_block(batch) for batch in batches])
    chunk = CopyChunk(kept)
    resources = read_blocks(chunk.blocks)
    selected = chunk.select_ids(ids)
    assert read_blocks(selected.blocks) == [resource for resource in resources if resource[0] in ids]
    assert selected.resource_lines == b"".join(
        encode(*resource).resource_line for resource in resources if resource[0] in ids
    )
    first, second = chunk.split()
    assert read_blocks(first.blocks) + read_blocks(second.blocks) == resources
    assert abs(len(first) - len(second)) <= 1
    if chunk:
        assert chunk.view_lines == [
            b"".join(encode(*resource).view_lines[view] for resource in resources) for view in range(2)
        ]


def test_a_dated_and_an_undated_version_are_written_one_after_the_other_in_the_order_in_which_they_were_added() -> None:
    def build(*resources: tuple[str, int, bool]) -> PartitionBlock:
        encoded = [encode(key, version)._replace(dated=dated) for key, version, dated in resources]
        block = CopyBlock.build(list(enumerate(encoded)), 2)
        return PartitionBlock(block, "w", [f"{key}{version}".encode() for key, version, _ in resources])

    blocks = [
        build(("a", 1, True), ("b", 1, False), ("c", 1, True), ("a", 2, True)),
        build(("a", 0, False), ("b", 3, True), ("b", 2, False), ("d", 1, False)),
    ]
    first, second = split_versions(blocks)
    assert read_blocks(first) == [("c", 1), ("a", 2), ("b", 3), ("d", 1)]
    assert read_blocks(second) == [("a", 0), ("b", 2)]


def test_an_empty_chunk_has_no_lines() -> None:
    assert (len(EMPTY_CHUNK), EMPTY_CHUNK.resource_lines, EMPTY_CHUNK.view_lines) == (0, b"", [])
