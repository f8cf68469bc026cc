"""A landing zone with files at random, which change while they are read, needs little memory and comes to an end.

The reader is another process with 500 MB. Nothing outside of the zone is read, and the good file is always received.
HOSTILE_EXAMPLES=5000 runs more examples.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fhir_assets_tests.support.hostile_folder import CHANGES, CONTENTS, KINDS
from fhir_assets_tests.support.limited_process import LimitedProcess

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "6"))
NAMES = (
    *(
        "a",
        "b",
        "new\nline",
        "\x1b[2J",
        "caf\udce9",
        "\udcff",
        "n" * 230,
        "-rf",
        " ",
        "..a",
        "\u202e",
        "a/b",
        "a/b/c",
        "*",
    ),
    *("/".join(["d" * 200] * 6), "\U0001f600", "%s", "a\\b", "good.ndjson"),
)
SUFFIXES = (
    ".ndjson",
    ".json",
    ".csv",
    ".ndjson.gz",
    ".json.gz",
    ".csv.gz",
    ".zip",
    ".NDJSON",
    "",
    ".ndjson.done",
    ".tmp",
)

_names = st.builds(str.__add__, st.sampled_from(NAMES), st.sampled_from(SUFFIXES))
_files = st.lists(st.tuples(_names, st.sampled_from(KINDS), st.sampled_from(sorted(CONTENTS))), min_size=1, max_size=6)
_changes = st.lists(st.sampled_from(CHANGES), max_size=3)
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)


@pytest.fixture(scope="module")
def reader() -> Iterator[LimitedProcess]:
    process = LimitedProcess("fhir_assets_tests.support.hostile_folder")
    yield process
    process.stop()


@pytest.mark.timeout(600 + 2 * EXAMPLES)
def test_a_hostile_folder_is_read_to_its_end_and_nothing_else(reader: LimitedProcess, database: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=_PHASES)
    @given(_files, _changes)
    def check(files: list[tuple[str, str, str]], changes: list[str]) -> None:
        assert reader.run("landing", files=files, changes=changes, database=database) == "ok"

    check()


@pytest.mark.parametrize("content", ["bomb", "braces", "bad lines", "bundle", "name without end"])
def test_large_content_of_little_needs_little(content: str, reader: LimitedProcess, database: str) -> None:
    files = [(f"a{suffix}", "file", content) for suffix in (".ndjson", ".json.gz", ".csv")]
    assert reader.run("landing", files=files, changes=[], database=database) == "ok"


def test_a_sparse_file_of_terabytes_is_read_up_to_the_limit(reader: LimitedProcess, database: str) -> None:
    files = [
        ("a.ndjson", "sparse", "good"),
        ("b.csv", "sparse", "good"),
        ("c.ndjson.gz", "sparse", "bomb in a bomb"),
    ]
    assert reader.run("landing", files=files, changes=[], database=database) == "ok"
