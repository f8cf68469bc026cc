"""Text of others in messages: names of files, and what servers send.

A control character in such a text could move the cursor of a terminal, change its title, or hide and fake lines.
"""

import re

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0, DEL and C1, line and paragraph separators, changes of the direction of text, and bytes that are not UTF-8."""

_LINES = "\n\t"


def escape_control_characters(text: str, *, lines: bool = False) -> str:
    r"""Return the text with every control character as an escape of JSON, such as ``\u001b``.

    JSON therefore stays the same JSON. With ``lines``, line feeds and tabs are kept.
    """
    if text.isascii() and text.isprintable():
        return text
    return _UNSAFE.sub(lambda match: match[0] if lines and match[0] in _LINES else f"\\u{ord(match[0]):04x}", text)
