"""Commits of a replay and a load of the same window: the second commit keeps the first."""

from datetime import UTC, datetime

import pytest

from fhir_assets.pipeline.partition_commit import merge_manifests
from fhir_assets.storage.manifest import REPLAY, Manifest, Part, Validated

NOW = datetime(2024, 1, 5, tzinfo=UTC)


def validated(parts: dict[str, int], inputs: tuple[str, ...], rows_in: int, dead: int) -> Manifest:
    """Return a validated partition with parts of these names and row counts."""
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
REPLAYED = validated({"a": 7, "replayed": 2}, ("raw1", f"{REPLAY}r"), 10, 1)


@pytest.mark.parametrize(("new", "current"), [(REPLAYED, EXTENDED), (EXTENDED, REPLAYED)])
def test_an_extension_and_a_replay_of_one_window_are_merged_in_any_order(new: Manifest, current: Manifest) -> None:
    merged = merge_manifests(new, BASE, current)
    assert merged.validated
    assert {part.name for part in merged.parts} == {"a", "b", "replayed"}
    assert merged.validated.raw_parts == {"raw1", "raw2"}
    assert merged.validated.replays == ["r"]
    assert merged.validated.rows_in == 16
    assert merged.rows + sum(merged.validated.dead.values()) == 16


def test_two_replays_of_one_window_are_merged() -> None:
    other = validated({"a": 7, "more": 1}, ("raw1", f"{REPLAY}s"), 10, 2)
    merged = merge_manifests(other, BASE, REPLAYED)
    assert merged.validated
    assert merged.rows == 10
    assert not merged.validated.dead
    assert merged.validated.replays == ["r", "s"]
