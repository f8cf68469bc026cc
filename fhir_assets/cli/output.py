"""How commands print: tables for people, JSON for programs."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from datetime import date, datetime
from decimal import Decimal

import orjson
from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH_ELSEWHERE = 160
"""Columns of a table where there is no terminal to ask."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_ELSEWHERE)
errors = Console(stderr=True, highlight=False)


@contextmanager
def only_our_words() -> Iterator[None]:
    """Meanwhile nothing but ``errors`` writes to stderr: what libraries say there are stack traces, which may quote
    a resource.
    """
    errors.file = sys.stderr
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        errors.file = None  # type: ignore[assignment]  # to rich: whatever sys.stderr is


def warn_of_clear_data() -> None:
    """Say, loudly and once, that patient data is stored in the clear."""
    errors.print(
        "[bold yellow]WARNING: patient data is stored in the clear, since there are no keys.[/bold yellow] "
        "For data of real people set PHI_ENCRYPTION_KEYS (`fhir-assets keys new` makes one); "
        "PHI_REQUIRED=1 refuses to run without.",
        soft_wrap=True,
    )


def print_json(value: object) -> None:
    """``value`` as one line of JSON on stdout."""
    sys.stdout.write(orjson.dumps(value, default=_plain).decode() + "\n")


def print_table(title: str, rows: Sequence[Mapping[str, object]], columns: Iterable[str]) -> None:
    """Rows as a table; numbers to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    names = list(columns)
    for name in names:
        numeric = any(isinstance(row.get(name), int | float | Decimal) for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(shown(row.get(name)) for name in names))
    console.print(table)


def shown(value: object) -> str:
    """A value as a table shows it."""
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
