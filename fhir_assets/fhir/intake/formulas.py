"""Guards for cells of CSV files that a spreadsheet would evaluate as formulas.

A guarded value begins with an apostrophe. A value that begins with apostrophes before such a character gets one more,
so that ``remove_guard`` returns every value as it was.
"""

import re

_STARTS = "=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20"
"""The characters with which a formula may begin, with the full-width forms that spreadsheets take for them."""

_is_formula = re.compile(f"'*[{_STARTS}]").match
_is_guarded = re.compile(f"'+[{_STARTS}]").match


def guard(value: str) -> str:
    """Return a text with an apostrophe before it if a spreadsheet would evaluate it as a formula."""
    return f"'{value}" if _is_formula(value) else value


def remove_guard(value: str) -> str:
    """Return the text that ``guard`` was given."""
    return value[1:] if _is_guarded(value) else value
