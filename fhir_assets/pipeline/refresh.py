"""The refresh mode of a run: which existing partitions it processes again."""

from enum import StrEnum


class Refresh(StrEnum):
    """Which existing partitions a run processes again."""

    MISSING = "missing"
    """Process new data only: complete windows are skipped, open windows are extended. Scheduled loads use this."""

    WINDOW = "window"
    """Fetch complete windows again and extend open ones; validate and load both again. The default of a
    materialization.
    """

    FULL = "full"
    """Fetch, validate and load every window again from its start."""
