"""Does a window bring about as much as the ones before it?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fhir_assets.windows import Window

FEWEST_WINDOWS = 5
"""With fewer windows to compare with nothing is unusual."""

FEWEST_ROWS = 20
"""What stays within so many resources is chance."""

FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class WindowVolume:
    """What a window brought, and the least and the most that a window before it did; None if nothing is judged."""

    partition_key: str
    rows: int
    lowest: int | None
    highest: int | None

    @property
    def unusual(self) -> bool:
        """Less than half of the least or more than twice the most."""
        if self.lowest is None or self.highest is None:
            return False
        too_few = self.rows < self.lowest / FACTOR and self.lowest >= FEWEST_ROWS
        return too_few or (self.rows > self.highest * FACTOR and self.rows >= FEWEST_ROWS)

    @property
    def description(self) -> str:
        """In words."""
        if self.lowest is None:
            return "too few windows before it to compare with"
        words = f"where the windows before it brought {self.lowest} to {self.highest}"
        return f"{self.rows} resources, {words}" if self.unusual else f"usual, {words}"


def compare_volumes(
    windows: Sequence[Window],
    judged: Sequence[Window],
    counted: Mapping[str, int],
    *,
    span: int,
) -> list[WindowVolume]:
    """The volume of each of the ``judged`` among the ``windows``, which are in order, held against up to ``span``
    windows before it. History begins with the first window that brought anything.
    """
    rows = [counted.get(window.key, 0) for window in windows]
    begin = next((place for place, count in enumerate(rows) if count), len(rows))
    places = {window.key: place for place, window in enumerate(windows)}
    found = []
    for window in judged:
        place = places[window.key]
        before = rows[max(begin, place - span) : place]
        enough = len(before) >= FEWEST_WINDOWS
        found.append(
            WindowVolume(
                window.key,
                rows[place],
                min(before) if enough else None,
                max(before) if enough else None,
            )
        )
    return found
