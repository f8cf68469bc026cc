"""Excel files of a view's rows. Text stays text: no value is a formula, and a code such as 0123 keeps its zeros.

Numbers of more than 15 digits, times, and dates before 1900 are text, because Excel would change them. A sheet has at
most 1,048,576 rows; further rows are on further sheets.
"""

import errno
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.exports.csv_tables import SCALARS, format_json
from fhir_assets.warehouse.postgres.tables.layout import TableColumn

_MAX_ROWS = 1 << 20
_MAX_CHARACTERS = 32_767
_MAX_DIGITS = 15
_FIRST_DATE = date(1900, 3, 1)
"""Earlier dates are written as text: Excel has a February 29 in 1900, which did not exist."""


def write(path: Path, columns: Sequence[TableColumn], rows: Iterable[Sequence[Any]]) -> int:
    """Write a header and rows, whose values are in the order of ``columns``. Return the number of rows.

    Raises ConfigurationError if a text is too long for a cell, or if xlsxwriter is not installed. Raises OSError if the
    file cannot be written. Temporary files are in a folder beside it, which is deleted in any case.
    """
    xlsxwriter = _import_xlsxwriter()
    with TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        try:
            options = {"constant_memory": True, "tmpdir": folder, "in_memory": False}
            return _write(xlsxwriter.Workbook(str(path), options), columns, rows)
        except xlsxwriter.exceptions.XlsxWriterException as error:
            cause = next(iter(error.args), None)
            raise (cause if isinstance(cause, OSError) else OSError(errno.EIO, str(error))) from None


def _write(workbook: Any, columns: Sequence[TableColumn], rows: Iterable[Sequence[Any]]) -> int:
    workbook.use_zip64()
    count = 0
    try:
        bold = workbook.add_format({"bold": True})
        day = workbook.add_format({"num_format": "yyyy-mm-dd"})
        sheet = None
        for row in rows:
            line = count % (_MAX_ROWS - 1) + 1
            if sheet is None or line == 1:
                sheet = _begin_sheet(workbook, columns, bold)
            for n, (column, value) in enumerate(zip(columns, row, strict=True)):
                if value is not None:
                    _write_cell(sheet, line, n, column, value, day)
            count += 1
        if sheet is None:
            _begin_sheet(workbook, columns, bold)
    finally:
        workbook.close()
    return count


def _begin_sheet(workbook: Any, columns: Sequence[TableColumn], bold: Any) -> Any:
    sheet = workbook.add_worksheet()
    for n, column in enumerate(columns):
        sheet.write_string(0, n, column.name, bold)
    return sheet


def _write_cell(sheet: Any, line: int, n: int, column: TableColumn, value: Any, day: Any) -> None:
    if isinstance(value, bool):
        sheet.write_boolean(line, n, value)
    elif isinstance(value, int | Decimal) and _is_exact(value):
        sheet.write_number(line, n, float(value))
    elif column.type == "date" and value >= _FIRST_DATE:
        sheet.write_datetime(line, n, value, day)
    else:
        text = _format(column.type, value)
        if len(text) > _MAX_CHARACTERS:
            raise ConfigurationError(
                f"column {column.name} has a text of {len(text):,} characters, and a cell of Excel holds "
                f"{_MAX_CHARACTERS:,}: export the table as csv or parquet"
            )
        sheet.write_string(line, n, text)


def _is_exact(value: int | Decimal) -> bool:
    """Return whether Excel shows a number with all of its digits."""
    number = Decimal(value).normalize()
    return number.is_finite() and len(number.as_tuple().digits) <= _MAX_DIGITS and -300 < number.adjusted() < 300


def _format(column_type: str, value: Any) -> str:
    if column_type in ("jsonb", "text[]"):
        return value if isinstance(value, str) else format_json(value)
    convert: Callable[[Any], str] = SCALARS.get(column_type, str)
    return convert(value)


def _import_xlsxwriter() -> Any:
    try:
        import xlsxwriter
        import xlsxwriter.exceptions
    except ImportError:
        raise ConfigurationError("the format xlsx requires XlsxWriter: pip install 'fhir-assets[xlsx]'") from None
    return xlsxwriter
