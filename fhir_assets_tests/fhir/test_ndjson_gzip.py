"""Lines of gzip files: with many members, with trailing bytes, damaged, and truncated at any position."""

import gzip
import random
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fhir_assets.fhir.lines import DamagedFile, decompress, read_lines

LIMIT = 1000


def random_lines(count: int) -> list[bytes]:
    """Return lines that compress badly, the last one without a line feed."""
    chance = random.Random(count)
    return [chance.randbytes(chance.randrange(1, 60)).hex().encode() for _ in range(count)]


def lines_of(path: Path, content: bytes) -> tuple[list[bytes | None], str]:
    """Return the lines of a file, and the message of its damage, if any."""
    path.write_bytes(content)
    lines: list[bytes | None] = []
    try:
        for batch in read_lines(path, LIMIT):
            lines += batch
    except DamagedFile as error:
        return lines, str(error)
    return lines, ""


@pytest.mark.parametrize("members", [1, 2, 40])
@pytest.mark.parametrize("zeros", [0, 1, 200_000])
def test_members_are_one_file_and_zero_bytes_after_them_are_ignored(tmp_path: Path, members: int, zeros: int) -> None:
    lines = random_lines(20_000)
    text = b"\n".join(lines)
    cuts = [0, *sorted(random.Random(1).sample(range(len(text)), members - 1)), len(text)]
    compressed = b"".join(gzip.compress(text[start:end]) for start, end in pairwise(cuts))
    assert lines_of(tmp_path / "x", compressed + b"\0" * zeros) == (lines, "")


def test_members_without_content_are_accepted(tmp_path: Path) -> None:
    compressed = gzip.compress(b"") + gzip.compress(b"a\nb") + gzip.compress(b"") + gzip.compress(b"c\n")
    assert lines_of(tmp_path / "x", compressed) == ([b"a", b"bc"], "")


@pytest.mark.parametrize("seed", range(20))
def test_every_complete_line_of_a_truncated_file_is_returned(tmp_path: Path, seed: int) -> None:
    compressed = gzip.compress(b"\n".join(random_lines(20_000)), compresslevel=1 + seed % 9)
    compressed = compressed[: random.Random(seed).randrange(2, len(compressed))]
    complete_lines = zlib.decompressobj(31).decompress(compressed).split(b"\n")[:-1]
    lines, message = lines_of(tmp_path / "x", compressed)
    assert lines == complete_lines
    assert "cut off" in message


def test_the_lines_of_a_first_member_are_returned_if_the_second_is_truncated(tmp_path: Path) -> None:
    lines, message = lines_of(tmp_path / "x", gzip.compress(b"a\nb\n") + gzip.compress(b"c\n" * 100)[:15])
    assert lines[:2] == [b"a", b"b"]
    assert "cut off" in message


@pytest.mark.parametrize("tail", [b"something else", b"\x1f\x8bsomething else", b"\n"])
def test_bytes_after_a_member_that_are_not_gzip_are_damage_after_its_lines(tmp_path: Path, tail: bytes) -> None:
    lines, message = lines_of(tmp_path / "x", gzip.compress(b"a\nb\n") + tail)
    assert lines == [b"a", b"b"]
    assert message


class Endless:
    """A stream of a member with content, and then the same bytes without end."""

    def __init__(self, rest: bytes) -> None:
        self._rest = rest
        self._first = gzip.compress(b"a\n")

    def read(self, count: int) -> bytes:
        piece, self._first = self._first[:count], self._first[count:]
        return piece or self._rest * (count // len(self._rest))


@pytest.mark.parametrize("rest", [bytes(1 << 16), gzip.compress(b"") * 1000], ids=["zeros", "members without content"])
def test_a_stream_whose_rest_has_no_content_ends(rest: bytes) -> None:
    pieces = decompress(Endless(rest))  # type: ignore[arg-type]
    assert next(pieces) == b"a\n"
    with pytest.raises(DamagedFile, match="64 MiB without content"):
        next(pieces)


def test_a_wrong_checksum_is_damage(tmp_path: Path) -> None:
    compressed = gzip.compress(b"a\nb\n")
    assert "damaged" in lines_of(tmp_path / "x", compressed[:-8] + b"\1\2\3\4" + compressed[-4:])[1]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_line_of_millions_of_bytes_is_not_kept_in_memory(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    compressed = compress(b"a\n" + b"x" * 30_000_000 + b"\nb\n" + b"y" * LIMIT + b"\n" + b"z" * (LIMIT + 1))
    tracemalloc.start()
    try:
        assert lines_of(tmp_path / "x", compressed) == ([b"a", None, b"b", b"y" * LIMIT, None], "")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
