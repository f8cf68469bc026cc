"""Compares the number of resources of a window with the windows before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fhir_assets.windows import Window

MIN_WINDOWS = 5
"""The minimum number of earlier windows: with fewer of them no window is reported as unusual."""

MIN_ROWS = 20
"""Windows with fewer resources than this are not reported: the difference may be chance."""

FACTOR = 2.0
"""A window is unusual if it has more than FACTOR times the highest number of the earlier windows, or less than the
lowest number divided by FACTOR.
"""


@dataclass(frozen=True, slots=True)
class WindowVolume:
    """The resources of a window, and the lowest and highest number in the windows before it (None: too few windows)."""

    partition_key: str
    rows: int
    lowest: int | None
    highest: int | None

    @property
    def unusual(self) -> bool:
        """Whether the number differs from those of the earlier windows by more than FACTOR."""
        if self.lowest is None or self.highest is None:
            return False
        too_few = self.rows < self.lowest / FACTOR and self.lowest >= MIN_ROWS
        return too_few or (self.rows > self.highest * FACTOR and self.rows >= MIN_ROWS)

    @property
    def description(self) -> str:
        """The comparison as text for a check result."""
        if self.lowest is None:
            return "too few earlier windows to compare with"
        expected = f"the windows before it have {self.lowest} to {self.highest}"
        return f"{self.rows} resources; {expected}" if self.unusual else f"usual; {expected}"


def compare_volumes(
    windows: Sequence[Window],
    compared: Sequence[Window],
    row_counts: Mapping[str, int],
    *,
    span: int,
) -> list[WindowVolume]:
    """Compare each of the ``compared`` windows with up to ``span`` windows before it.

    ``windows`` are in order and contain the compared ones; ``row_counts`` has the resources by partition key. Windows
    before the first one with resources are ignored.
    """
    rows = [row_counts.get(window.key, 0) for window in windows]
    begin = next((index for index, count in enumerate(rows) if count), len(rows))
    indexes = {window.key: index for index, window in enumerate(windows)}
    volumes = []
    for window in compared:
        index = indexes[window.key]
        before = rows[max(begin, index - span) : index]
        enough = len(before) >= MIN_WINDOWS
        volumes.append(
            WindowVolume(
                window.key,
                rows[index],
                min(before) if enough else None,
                max(before) if enough else None,
            )
        )
    return volumes
