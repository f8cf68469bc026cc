"""The source `ndjson` on compressed files as they come: of many members, with a tail, damaged, cut off anywhere."""

import gzip
import random
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fhir_assets.fhir.lines import DamagedFile, read_lines

LIMIT = 1000


def noise(count: int) -> list[bytes]:
    """Lines that do not compress to nothing, the last one without a line feed."""
    chance = random.Random(count)
    return [chance.randbytes(chance.randrange(1, 60)).hex().encode() for _ in range(count)]


def lines_of(path: Path, content: bytes) -> tuple[list[bytes | None], str]:
    """The lines that a file gives, and what it then broke off with."""
    path.write_bytes(content)
    found: list[bytes | None] = []
    try:
        for some in read_lines(path, LIMIT):
            found += some
    except DamagedFile as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize("members", [1, 2, 40])
@pytest.mark.parametrize("zeros", [0, 1, 200_000])
def test_members_are_one_file_and_zeros_after_it_nothing(tmp_path: Path, members: int, zeros: int) -> None:
    lines = noise(20_000)
    text = b"\n".join(lines)
    cuts = [0, *sorted(random.Random(1).sample(range(len(text)), members - 1)), len(text)]
    packed = b"".join(gzip.compress(text[start:end]) for start, end in pairwise(cuts))
    assert lines_of(tmp_path / "x", packed + b"\0" * zeros) == (lines, "")


def test_members_without_content_pass(tmp_path: Path) -> None:
    packed = gzip.compress(b"") + gzip.compress(b"a\nb") + gzip.compress(b"") + gzip.compress(b"c\n")
    assert lines_of(tmp_path / "x", packed) == ([b"a", b"bc"], "")


@pytest.mark.parametrize("seed", range(20))
def test_every_whole_line_before_a_missing_end_is_given(tmp_path: Path, seed: int) -> None:
    packed = gzip.compress(b"\n".join(noise(20_000)), compresslevel=1 + seed % 9)
    packed = packed[: random.Random(seed).randrange(2, len(packed))]
    there = zlib.decompressobj(31).decompress(packed).split(b"\n")[:-1]
    lines, why = lines_of(tmp_path / "x", packed)
    assert lines == there
    assert "cut off" in why


def test_a_second_member_that_is_cut_off_does_not_hide_the_first(tmp_path: Path) -> None:
    lines, why = lines_of(tmp_path / "x", gzip.compress(b"a\nb\n") + gzip.compress(b"c\n" * 100)[:15])
    assert lines[:2] == [b"a", b"b"]
    assert "cut off" in why


@pytest.mark.parametrize("tail", [b"something else", b"\x1f\x8bsomething else", b"\n"])
def test_what_follows_a_member_and_is_none_is_damage_after_its_lines(tmp_path: Path, tail: bytes) -> None:
    lines, why = lines_of(tmp_path / "x", gzip.compress(b"a\nb\n") + tail)
    assert lines == [b"a", b"b"]
    assert why


def test_a_wrong_checksum_is_damage(tmp_path: Path) -> None:
    packed = gzip.compress(b"a\nb\n")
    assert "damaged" in lines_of(tmp_path / "x", packed[:-8] + b"\1\2\3\4" + packed[-4:])[1]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_line_of_millions_of_bytes_is_not_held(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(b"a\n" + b"x" * 30_000_000 + b"\nb\n" + b"y" * LIMIT + b"\n" + b"z" * (LIMIT + 1))
    tracemalloc.start()
    try:
        assert lines_of(tmp_path / "x", packed) == ([b"a", None, b"b", b"y" * LIMIT, None], "")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
