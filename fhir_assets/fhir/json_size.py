"""The number of values of a JSON text, which decides how much memory its objects take."""

MAX_VALUES = 2_000_000
"""The default limit of the values of one resource, one container or one request."""


def has_more_values(text: bytes, limit: int) -> bool:
    """Return whether a JSON text may have more than ``limit`` values: it has more commas, those in strings included.

    An empty object takes three bytes of a text, and more than a hundred in memory.
    """
    return len(text) > limit and text.count(b",") > limit
