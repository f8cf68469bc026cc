"""A replay and a load that worked on one window at once: both are kept when the second commits."""

from datetime import UTC, datetime

import pytest

from fhir_assets.pipeline.partition_commit import merge_manifests
from fhir_assets.storage.manifest import REPLAY, Manifest, Part, Validated

NOW = datetime(2024, 1, 5, tzinfo=UTC)


def validated(parts: dict[str, int], inputs: tuple[str, ...], rows_in: int, dead: int) -> Manifest:
    """A validated partition of parts by name and rows."""
    return Manifest(
        "validated",
        "Patient",
        "2024-01-05",
        "run",
        NOW,
        tuple(Part(name, rows, rows, rows) for name, rows in parts.items()),
        validated=Validated(inputs, "rules", rows_in, {"structure": dead}, {}),
    )


BASE = validated({"a": 7}, ("raw1",), 10, 3)
EXTENDED = validated({"a": 7, "b": 5}, ("raw1", "raw2"), 16, 4)
REPLAYED = validated({"a": 7, "healed": 2}, ("raw1", f"{REPLAY}r"), 10, 1)


@pytest.mark.parametrize(("mine", "now"), [(REPLAYED, EXTENDED), (EXTENDED, REPLAYED)])
def test_an_extension_and_a_replay_of_one_window_add_up_whichever_commits_last(mine: Manifest, now: Manifest) -> None:
    found = merge_manifests(mine, BASE, now)
    assert found.validated
    assert {part.name for part in found.parts} == {"a", "b", "healed"}
    assert found.validated.raw_parts == {"raw1", "raw2"}
    assert found.validated.replays == ["r"]
    assert found.validated.rows_in == 16
    assert found.rows + sum(found.validated.dead.values()) == 16


def test_two_replays_of_one_window_add_up() -> None:
    other = validated({"a": 7, "more": 1}, ("raw1", f"{REPLAY}s"), 10, 2)
    found = merge_manifests(other, BASE, REPLAYED)
    assert found.validated
    assert found.rows == 10
    assert not found.validated.dead
    assert found.validated.replays == ["r", "s"]
