"""Chunks of blocks: cut apart and put together, each resource keeps its own lines."""

from hypothesis import given
from hypothesis import strategies as st

from fhir_assets.warehouse.postgres.tables.copy_blocks import CopyBlock, Prepared
from fhir_assets.warehouse.postgres.tables.copy_chunks import NOTHING, Chunk, Piece, newest

Resource = tuple[str, int]
"""An id, and a version."""

RESOURCES = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3)), max_size=8)


def prepared(key: str, version: int) -> Prepared:
    head, rows = f"{key}\t{version}\n", [f"{key}{version}\n" * (version % 3), ""]
    return Prepared(key, 1.0, version, head.encode(), [text.encode() for text in rows])


def piece(resources: list[Resource], partition_key: str = "w") -> Piece:
    block = CopyBlock.of([(place, prepared(*each)) for place, each in enumerate(resources)], 2)
    return Piece(block, partition_key, [f"{key}{version}".encode() for key, version in resources])


def held(pieces: list[Piece]) -> list[Resource]:
    """Which resources pieces hold; fails if a resource's texts or its line are another's."""
    found = []
    for block, _, lines in pieces:
        for n, key in enumerate(block.ids):
            version = block.numbers[n]
            whole = prepared(key, version)
            assert block.heads.pick([n]).text == whole.head
            assert [texts.pick([n]).text for texts in block.rows] == whole.rows
            assert lines[block.places[n]] == f"{key}{version}".encode()
            found.append((key, version))
    return found


@given(st.lists(RESOURCES, max_size=5))
def test_the_newest_of_each_resource_stays_and_of_equals_the_last(batches: list[list[Resource]]) -> None:
    all_of_them = [(each, p, n) for p, batch in enumerate(batches) for n, each in enumerate(batch)]
    best = {key: max((v, p, n) for (k, v), p, n in all_of_them if k == key) for (key, _), _, _ in all_of_them}
    expected = [(key, v) for v, p, n, key in sorted(((v, p, n, key) for key, (v, p, n) in best.items()), key=place)]
    chosen = newest([piece(batch) for batch in batches])
    assert held(chosen) == expected
    assert len(Chunk(chosen)) == len(expected)


def place(found: tuple[int, int, int, str]) -> tuple[int, int]:
    return found[1], found[2]


@given(st.lists(RESOURCES, max_size=5), st.sets(st.sampled_from("abcdefgh")))
def test_a_chunk_cut_apart_has_the_lines_of_what_is_left(batches: list[list[Resource]], ids: set[str]) -> None:
    chunk = Chunk(newest([piece(batch) for batch in batches]))
    some = chunk.only(ids)
    assert held(some.pieces) == [each for each in held(chunk.pieces) if each[0] in ids]
    assert some.heads == b"".join(prepared(*each).head for each in held(some.pieces))
    first, second = chunk.halves()
    assert held(first.pieces) + held(second.pieces) == held(chunk.pieces)
    assert abs(len(first) - len(second)) <= 1
    if chunk:
        assert chunk.rows == [b"".join(prepared(*each).rows[view] for each in held(chunk.pieces)) for view in range(2)]


def test_nothing_has_no_lines() -> None:
    assert (len(NOTHING), NOTHING.heads, NOTHING.rows) == (0, b"", [])
