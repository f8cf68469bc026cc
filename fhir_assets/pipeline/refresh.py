"""How much of the stored data a run processes again."""

from enum import StrEnum


class Refresh(StrEnum):
    """How much of what is already there is done again."""

    MISSING = "missing"
    """Only what is not there yet: a complete window is left alone, an open one extended. Scheduled loads."""

    WINDOW = "window"
    """A complete window is fetched anew, an open one extended; either is validated and loaded anew. What
    ``materialize`` means.
    """

    FULL = "full"
    """Everything anew."""
