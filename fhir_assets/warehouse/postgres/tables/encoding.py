r"""Values of a view's rows as the text that COPY reads, checked so that Postgres takes every line.

A value that Postgres would refuse raises Refused, whose message never holds the value.
"""

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

import msgspec

from fhir_assets.fhir.views import Column, View
from fhir_assets.privacy.encryption import Cipher, as_json
from fhir_assets.warehouse.postgres.tables.layout import (
    PARTIAL_DATE_KINDS,
    Kind,
    PhiTreatment,
    column_kind,
    has_blind_index,
    holds_phi,
    phi_treatment,
)

Cell = Callable[[object], str]
"""A value that is not None as the text of its cell, or of its two: that of a partial date and its precision."""

NULL = r"\N"
MAX_INDEXED_BYTES = 2600
"""Bytes: a B-tree takes no longer key than a third of a page."""

_DATE = re.compile(r"\d{4}(?:-\d{2}(?:-\d{2})?)?").fullmatch
_DATETIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:\d{2})?").fullmatch
_TIME = re.compile(r"\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?").fullmatch
_SURROGATE = re.compile(r"[\ud800-\udfff]").search
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_json = msgspec.json.Encoder(decimal_format="number").encode


class UnstorableValue(ValueError):
    """A value that does not fit its column; says why, without the value."""


def build_row_encoder(view: View, cipher: Cipher) -> Callable[[Sequence[object]], str]:
    """The function from a row of the view to its COPY line, without the key column and the line feed. What the view
    tags as patient data goes through ``sealing``.

    It raises Refused, with the index of the column as second argument.
    """
    made = [_column(column, cipher) for column in view.columns]
    cells = [cell for cell, _ in made]
    write = _writer(made, f"\t{cipher.key_id}" if cipher.on and holds_phi(view) else "")

    def encode(row: Sequence[object]) -> str:
        try:
            return write(row)
        except (UnstorableValue, ValueError, TypeError, OverflowError):
            raise _located(cells, row) from None

    return encode


def _writer(columns: Sequence[tuple[Cell, str]], end: str) -> Callable[[Sequence[object]], str]:
    """The line of a row as one generated expression: most values of a wide row are null or plain text, and a loop over
    them, or a call for each, costs more than what is done with them.
    """
    namespace: dict[str, Any] = {"end": end, "backslash": "\\"}
    line = ""
    for i, (cell, null) in enumerate(columns):
        namespace |= {f"cell{i}": cell, f"null{i}": null}
        plain = _if_plain(f"v{i}") if cell in _TEXTS else ""
        line += f"{{null{i} if v{i} is None else {plain}cell{i}(v{i})}}\t"
    names = "".join(f"v{i}, " for i in range(len(columns)))
    exec(f"def write(row):\n    {names} = row\n    return f'{line[:-1]}{{end}}'", namespace)
    write: Callable[[Sequence[object]], str] = namespace["write"]
    return write


def _located(cells: Sequence[Cell], row: Sequence[object]) -> UnstorableValue:
    for place, (cell, value) in enumerate(zip(cells, row, strict=False)):
        try:
            if value is not None:
                cell(value)
        except UnstorableValue as refused:
            return UnstorableValue(str(refused), place)
        except (ValueError, TypeError, OverflowError):
            return UnstorableValue("a value of a type that the column does not take", place)
    return UnstorableValue("a row with another number of columns than the view", 0)


def encode_body(body: bytes, cipher: Cipher) -> bytes:
    """A resource's JSON, sealed, as COPY text for a jsonb column. Raises Refused for what jsonb cannot hold."""
    if cipher.on:
        if b"\\u" in body:
            check_escapes(body)
        return as_json(cipher.compress_and_encrypt(body))
    if b"\\" in body:
        if b"\\u" in body:
            check_escapes(body)
        body = body.replace(b"\\", b"\\\\")
    return body.replace(b"\t", b" ") if b"\t" in body else body


def check_escapes(body: bytes) -> None:
    """Raises Refused if JSON text holds the NUL character or half a surrogate pair, which Postgres does not store."""
    high_ends_at = -1
    for escape in _ESCAPE.finditer(body):
        code = int(escape[1], 16) if escape[1] else -1
        low = 0xDC00 <= code < 0xE000
        if code == 0:
            raise UnstorableValue(_NUL)
        if low != (high_ends_at == escape.start()):
            raise UnstorableValue(_HALF)
        if high_ends_at >= 0 and not low:
            raise UnstorableValue(_HALF)
        high_ends_at = escape.end() if 0xD800 <= code < 0xDC00 else -1
    if high_ends_at >= 0:
        raise UnstorableValue(_HALF)


def escape_text(value: str) -> str:
    """Text as COPY reads it. Raises Refused for a NUL character or half a surrogate pair."""
    if value.isprintable() and "\\" not in value:
        return value
    if "\\" in value:
        value = value.replace("\\", "\\\\")
    if "\n" in value:
        value = value.replace("\n", "\\n")
    if "\t" in value:
        value = value.replace("\t", "\\t")
    if "\r" in value:
        value = value.replace("\r", "\\r")
    if "\0" in value:
        raise UnstorableValue(_NUL)
    if not value.isascii() and _SURROGATE(value):
        raise UnstorableValue(_HALF)
    return value


_NUL = "text with the NUL character (\\u0000), which Postgres does not store: remove it at the source"
_HALF = "text with half a surrogate pair, which is no character: correct it at the source"


def encode_text_array(values: Sequence[str]) -> str:
    """An array of texts as COPY reads it. Raises Refused."""
    return _texts(values)


_TWO_NULLS = f"{NULL}\t{NULL}"


def _column(column: Column, cipher: Cipher) -> tuple[Cell, str]:
    """How a column's value is written, and its null."""
    kind = column_kind(column)
    match phi_treatment(column, encrypted=cipher.on):
        case PhiTreatment.ENCRYPT if has_blind_index(column):
            return lambda value: f"{cipher.token(text := _sealable(value))}\t{cipher.index(text)}", _TWO_NULLS
        case PhiTreatment.ENCRYPT:
            return lambda value: cipher.token(_sealable(value)), NULL
        case PhiTreatment.HASH:
            return lambda value: cipher.index(_sealable(value)), NULL
        case PhiTreatment.DROP:
            null = _TWO_NULLS if kind in PARTIAL_DATE_KINDS else NULL
            return lambda value: null, null
        case phi:
            cell = _cell(kind, indexed="index" in column.tags)
            null = _TWO_NULLS if kind in PARTIAL_DATE_KINDS else NULL
            return (lambda value: cell(str(value)[:4])) if phi is PhiTreatment.YEAR else cell, null


def _sealable(value: object) -> str:
    """A value as the text that is encrypted or hashed; refused where it would be in the clear."""
    text: str = value if value.__class__ is str else _json(value).decode()
    if "\0" in text:
        raise UnstorableValue(_NUL)
    if not text.isascii() and _SURROGATE(text):
        raise UnstorableValue(_HALF)
    return text


def _cell(kind: Kind, *, indexed: bool) -> Cell:
    if kind is Kind.TEXT:
        return _indexed_text if indexed else _text
    return _CELLS[kind]


def _text(value: object) -> str:
    if value.__class__ is not str:
        value = _json(value).decode()
    return escape_text(value)


def _indexed_text(value: object) -> str:
    text = _text(value)
    if len(text) * 4 > MAX_INDEXED_BYTES and len(text.encode()) > MAX_INDEXED_BYTES:
        raise UnstorableValue(
            f"text of more than {MAX_INDEXED_BYTES} bytes in an indexed column: remove its tag `index`"
        )
    return text


def _boolean(value: object) -> str:
    if value is True:
        return "t"
    if value is False:
        return "f"
    raise UnstorableValue("not a boolean")


def _integer(value: object) -> str:
    if value.__class__ is not int:
        raise UnstorableValue("not an integer")
    if -0x80000000 <= value <= 0x7FFFFFFF:
        return str(value)
    raise UnstorableValue("an integer beyond 32 bits")


def _bigint(value: object) -> str:
    if value.__class__ is str:
        value = int(value)
    if value.__class__ is not int:
        raise UnstorableValue("not an integer")
    if -0x8000000000000000 <= value <= 0x7FFFFFFFFFFFFFFF:
        return str(value)
    raise UnstorableValue("an integer beyond 64 bits")


def _numeric(value: object) -> str:
    if value.__class__ is Decimal:
        text = str(value)
        if len(text) < 1000 and "E" not in text:
            if text[-1] <= "9":
                return text
            raise UnstorableValue("not a number")
        exponent = value.as_tuple().exponent
        if not isinstance(exponent, int):
            raise UnstorableValue("not a number")
        if exponent < -16_383 or value.adjusted() >= 131_072:
            raise UnstorableValue("a number with more digits than Postgres's numeric holds")
        return text
    if value.__class__ is int:
        return str(value)
    if value.__class__ is float and value == value and abs(value) != float("inf"):
        return repr(value)
    raise UnstorableValue("not a number")


def _date(value: object) -> str:
    if value.__class__ is not str or not _DATE(value):
        raise UnstorableValue("not a date of the form YYYY, YYYY-MM or YYYY-MM-DD")
    return _whole_date(value)


def _whole_date(text: str) -> str:
    if len(text) == 10:
        whole, precision = text, "day"
    elif len(text) == 7:
        whole, precision = f"{text}-01", "month"
    else:
        whole, precision = f"{text}-01-01", "year"
    try:
        date.fromisoformat(whole)
    except ValueError:
        raise UnstorableValue("a date that the calendar does not have") from None
    return f"{whole}\t{precision}"


def _datetime(value: object) -> str:
    if value.__class__ is not str:
        raise UnstorableValue("not a dateTime")
    return _date(value) if len(value) <= 10 else f"{_moment(value)}\tinstant"


def _instant(value: object) -> str:
    if value.__class__ is not str:
        raise UnstorableValue("not a dateTime")
    return _moment(value)


@lru_cache(8192)
def _moment(text: str) -> str:
    """A time that Postgres takes. Those of a resource and of its neighbours are often the same."""
    if not _DATETIME(text):
        raise UnstorableValue("not a time of the form YYYY-MM-DDThh:mm:ss with a zone")
    try:
        datetime.fromisoformat(text)
    except ValueError:
        if text[16:19] != ":60" or not _is_moment(f"{text[:17]}59{text[19:]}"):
            raise UnstorableValue("a time that the calendar or the clock does not have") from None
    if text[-6] in "+-" and (text[-5:-3] > "15" or text[-2:] > "59"):
        raise UnstorableValue("a time zone that does not exist")
    return text


def _is_moment(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _time(value: object) -> str:
    if value.__class__ is not str or not _TIME(value):
        raise UnstorableValue("not a time of the form hh:mm:ss")
    text: str = value
    if text[:2] > "23" or text[3:5] > "59" or text[6:8] > "60":
        raise UnstorableValue("a time that the clock does not have")
    return text


def _as_json(value: object) -> str:
    encoded = _json(value)
    if b"\\u" in encoded:
        check_escapes(encoded)
    return encoded.decode().replace("\\", "\\\\")


def _texts(value: object) -> str:
    if not isinstance(value, list | tuple):
        raise UnstorableValue("not a collection")
    return escape_text("{" + ",".join([_element(each) for each in value]) + "}")


def _element(value: object) -> str:
    if value is None:
        return "NULL"
    text = value if isinstance(value, str) else _json(value).decode()
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'


_TEXTS: tuple[Cell, ...] = (_text, _indexed_text)


def _if_plain(name: str) -> str:
    """The beginning of a conditional expression: text that stands in a line as it is."""
    plain = f"len({name}) < {MAX_INDEXED_BYTES // 4} and {name}.isprintable() and backslash not in {name}"
    return f"{name} if {name}.__class__ is str and {plain} else "


_CELLS: dict[Kind, Cell] = {
    Kind.BOOLEAN: _boolean,
    Kind.INTEGER: _integer,
    Kind.BIGINT: _bigint,
    Kind.NUMERIC: _numeric,
    Kind.DATE: _date,
    Kind.DATETIME: _datetime,
    Kind.INSTANT: _instant,
    Kind.TIME: _time,
    Kind.JSON: _as_json,
    Kind.TEXTS: _texts,
}
