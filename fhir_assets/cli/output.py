"""Output of commands: tables for people, JSON for programs."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fhir_assets.atomic_files import replace_file
from fhir_assets.control_characters import escape_control_characters
from fhir_assets.foreign_errors import choose_error

_WIDTH_WITHOUT_TERMINAL = 160
"""Width of a table, in characters, if stdout is not a terminal."""


class _Console(Console):
    """A console that shows control characters as escapes: names of files and texts of servers pass here."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text of ``print`` without control characters."""
        return super().render_str(escape_control_characters(text), **options)


console = _Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
errors = _Console(stderr=True, highlight=False, emoji=False)


@contextmanager
def hide_library_output() -> Iterator[None]:
    """Discard the output of libraries to stderr, because their stack traces may quote a resource.

    ``errors`` still prints to stderr.
    """
    errors.file = sys.stderr
    try:
        with open(os.devnull, "w") as devnull, redirect_stderr(devnull):
            yield
    finally:
        errors.file = None  # type: ignore[assignment]  # rich takes None as the current sys.stderr


@contextmanager
def open_output(path: Path | None, option: str) -> Iterator[BinaryIO]:
    """Open the output of a command for writing: stdout if ``path`` is None or ``-``, otherwise a file.

    The file is replaced when the ``with`` block ends without an error; until then it keeps its content. ``option``
    names the option of ``path`` in messages. Raises OutOfResources or ConfigurationError if the output cannot
    be written.
    """
    try:
        if path is None or str(path) == "-":
            yield sys.stdout.buffer
            sys.stdout.flush()
        else:
            with replace_file(path) as file:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise choose_error(error)(
            f"cannot write {path or 'to stdout'}: {reason}; free space, or pass another {option}"
        ) from None


def warn_of_clear_data() -> None:
    """Print a warning that patient data is stored in the clear."""
    errors.print(
        "[bold yellow]WARNING: patient data is stored in the clear: PHI_ENCRYPTION_KEYS is not set.[/bold yellow]"
        " Set it before you load data of real people: `fhir-assets keys new` creates a key. "
        "With PHI_REQUIRED=1 nothing runs without a key.",
        soft_wrap=True,
    )


def print_json(value: object) -> None:
    """Print ``value`` as one line of JSON on stdout."""
    sys.stdout.write(escape_control_characters(orjson.dumps(value, default=_plain).decode()) + "\n")


def print_table(title: str, rows: Sequence[Mapping[str, object]], columns: Iterable[str]) -> None:
    """Print ``columns`` of the rows as a table. Columns of numbers are right-aligned."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    names = list(columns)
    for name in names:
        numeric = any(isinstance(row.get(name), int | float | Decimal) for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if numeric else "left")
    for row in rows:
        # As Text, because a name such as [red] is no markup.
        table.add_row(*(Text(escape_control_characters(format_cell(row.get(name)))) for name in names))
    console.print(table)


def format_cell(value: object) -> str:
    """Return the text of a value in a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return str(value)


def _plain(value: object) -> object:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bytes | memoryview):
        return bytes(value).decode("utf-8", "replace")
    raise TypeError(type(value).__name__)


def print_progress(text: str) -> None:
    """Print the progress of a bulk export to stderr, above a progress bar; stdout contains only the summary."""
    errors.print(text, markup=False, soft_wrap=True)
