"""Encoding of values in the text format of COPY, with checks that Postgres accepts every line.

A value that Postgres would reject raises ``UnstorableValue``. The message of that error never contains the value.
"""

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from fhir_assets.fhir.half_surrogates import HALF_SURROGATE_PAIR
from fhir_assets.fhir.views import Column, View
from fhir_assets.privacy.encryption import Cipher, as_json
from fhir_assets.privacy.places import resource_associated_data, table_in_places
from fhir_assets.warehouse.postgres.tables.layout import (
    PARTIAL_DATE_KINDS,
    Kind,
    PhiTreatment,
    column_kind,
    has_blind_index,
    has_day_columns,
    holds_phi,
    phi_treatment,
)

ValueEncoder = Callable[[object], str]
"""Returns the text of a value that is not None. The text of a date or time may be several cells: its precision, day and
offset follow.
"""

NULL = r"\N"
MAX_INDEXED_BYTES = 2600
"""The maximum length of a text in an indexed column, in bytes. A B-tree key may occupy a third of a page."""

_DATE = re.compile(r"\d{4}(?:-\d{2}(?:-\d{2})?)?").fullmatch
_DATETIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:\d{2})?").fullmatch
_TIME = re.compile(r"\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?").fullmatch
_END_OF_DAY = re.compile(r"24:00(?::00(?:\.0+)?)?(?![\d.:])").match
_SURROGATE = re.compile(r"[\ud800-\udfff]").search
_UNSTORABLE = re.compile(r"[\0\ud800-\udfff]").search
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_json = msgspec.json.Encoder(decimal_format="number").encode


class UnstorableValue(ValueError):
    """Raised for a value that its column cannot store. The message states the reason and does not contain the value."""


class _ColumnEncoder(NamedTuple):
    """The encoder of a column's values, and the text for null. One that encrypts also takes the id of the resource."""

    encode: Callable[..., str]
    null: str
    encrypts: bool = False


def build_row_encoder(view: View, cipher: Cipher, source: str) -> Callable[[Sequence[object], str], str]:
    """Return a function that encodes a row of ``view`` as a line of COPY, without the key column and the line feed.

    Its second argument is the id of the row's resource in ``source``. Columns that the view tags as patient data are
    encrypted with ``cipher`` and bound to that resource. The function raises UnstorableValue with the index of the
    column as second argument.
    """
    encoders = [_build_column_encoder(view, column, cipher, source) for column in view.columns]
    write = _compile_row_writer(encoders, f"\t{cipher.key_id}" if cipher.encrypts and holds_phi(view) else "")

    def encode(row: Sequence[object], resource_id: str) -> str:
        try:
            return write(row, resource_id)
        except (UnstorableValue, ValueError, TypeError, OverflowError):
            raise _find_unstorable_column(encoders, row) from None

    return encode


def _compile_row_writer(columns: Sequence[_ColumnEncoder], end: str) -> Callable[[Sequence[object], str], str]:
    """Compile a function that encodes a row in one expression.

    Most values of a wide row are null or plain text; a loop or a call for each value would take longer than the
    encoding.
    """
    namespace: dict[str, Any] = {"end": end, "backslash": "\\"}
    line = ""
    for i, (encode_value, null, encrypts) in enumerate(columns):
        namespace |= {f"encode{i}": encode_value, f"null{i}": null}
        plain = _plain_text_branch(f"v{i}") if encode_value in _TEXT_ENCODERS else ""
        arguments = f"v{i}, key" if encrypts else f"v{i}"
        line += f"{{null{i} if v{i} is None else {plain}encode{i}({arguments})}}\t"
    names = "".join(f"v{i}, " for i in range(len(columns)))
    exec(f"def write(row, key):\n    {names} = row\n    return f'{line[:-1]}{{end}}'", namespace)
    write: Callable[[Sequence[object], str], str] = namespace["write"]
    return write


def _find_unstorable_column(columns: Sequence[_ColumnEncoder], row: Sequence[object]) -> UnstorableValue:
    """Encode the values of a row one by one, and return the error of the first that fails, with its column."""
    for index, (column, value) in enumerate(zip(columns, row, strict=False)):
        try:
            if value is not None:
                column.encode(value, "") if column.encrypts else column.encode(value)
        except UnstorableValue as error:
            return UnstorableValue(str(error), index)
        except (ValueError, TypeError, OverflowError):
            return UnstorableValue("a value of a type that the column does not accept", index)
    return UnstorableValue("a row whose number of values differs from the number of columns of the view", 0)


def encode_body(body: bytes, cipher: Cipher, source: str, resource_type: str, resource_id: str) -> bytes:
    """Encode the JSON of a resource for a jsonb column, encrypted and bound to the resource if ``cipher`` has keys.

    Raises UnstorableValue for text that jsonb cannot store.
    """
    if cipher.encrypts:
        if b"\\u" in body:
            check_escapes(body)
        return as_json(cipher.compress_and_bind(body, resource_associated_data(source, resource_type, resource_id)))
    if b"\\" in body:
        if b"\\u" in body:
            check_escapes(body)
        body = body.replace(b"\\", b"\\\\")
    return body.replace(b"\t", b" ") if b"\t" in body else body


def check_escapes(body: bytes) -> None:
    """Check the escape sequences of JSON text.

    Raises UnstorableValue for the NUL character and for half a surrogate pair, which Postgres does not store.
    """
    high_ends_at = -1
    for escape in _ESCAPE.finditer(body):
        code = int(escape[1], 16) if escape[1] else -1
        low = 0xDC00 <= code < 0xE000
        if code == 0:
            raise UnstorableValue(_NUL)
        if low != (high_ends_at == escape.start()):
            raise UnstorableValue(HALF_SURROGATE_PAIR)
        if high_ends_at >= 0 and not low:
            raise UnstorableValue(HALF_SURROGATE_PAIR)
        high_ends_at = escape.end() if 0xD800 <= code < 0xDC00 else -1
    if high_ends_at >= 0:
        raise UnstorableValue(HALF_SURROGATE_PAIR)


def escape_text(value: str) -> str:
    """Escape text for COPY. Raises UnstorableValue for the NUL character and for half a surrogate pair."""
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
        raise UnstorableValue(HALF_SURROGATE_PAIR)
    return value


def is_storable(text: str) -> bool:
    """Return whether Postgres stores a text: one without the NUL character and without half a surrogate pair."""
    return not _UNSTORABLE(text)


_NUL = "text with the NUL character (\\u0000), which Postgres does not store: remove it at the source"


def encode_text_array(values: Sequence[str]) -> str:
    """Encode a list of texts for a column of type text[]. Raises UnstorableValue."""
    return _encode_array(values)


_TWO_NULLS = f"{NULL}\t{NULL}"


def _build_column_encoder(view: View, column: Column, cipher: Cipher, source: str) -> _ColumnEncoder:
    """Return the encoder of a column, with the cells of day and offset if the table has them."""
    kind = column_kind(column)
    with_day = has_day_columns(view, column)
    nulls = "\t".join([NULL] * (1 + (kind in PARTIAL_DATE_KINDS) + 2 * with_day))
    match phi_treatment(column, encrypted=cipher.encrypts):
        case PhiTreatment.ENCRYPT:
            return _build_encrypting_encoder(view, column, cipher, source)
        case PhiTreatment.HASH:
            return _ColumnEncoder(lambda value: cipher.index(_to_plaintext(value)), NULL)
        case PhiTreatment.DROP:
            return _ColumnEncoder(lambda value: nulls, nulls)
        case phi:
            encode_value = (
                _ENCODERS_WITH_DAY[kind] if with_day else _choose_encoder(kind, indexed="index" in column.tags)
            )
            if phi is PhiTreatment.YEAR:
                return _ColumnEncoder(lambda value: encode_value(str(value)[:4]), nulls)
            return _ColumnEncoder(encode_value, nulls)


def _build_encrypting_encoder(view: View, column: Column, cipher: Cipher, source: str) -> _ColumnEncoder:
    encrypt = cipher.build_encryptor(table_in_places(view.name), column.name, source)

    def encode(value: object, resource_id: str) -> str:
        return encrypt(_to_plaintext(value), resource_id)

    def encode_with_index(value: object, resource_id: str) -> str:
        text = _to_plaintext(value)
        return f"{encrypt(text, resource_id)}\t{cipher.index(text)}"

    if has_blind_index(column):
        return _ColumnEncoder(encode_with_index, _TWO_NULLS, encrypts=True)
    return _ColumnEncoder(encode, NULL, encrypts=True)


def _to_plaintext(value: object) -> str:
    """Return the text of a value that is to be encrypted or hashed, with the same checks as for unencrypted text."""
    text: str = value if value.__class__ is str else _json(value).decode()
    if "\0" in text:
        raise UnstorableValue(_NUL)
    if not text.isascii() and _SURROGATE(text):
        raise UnstorableValue(HALF_SURROGATE_PAIR)
    return text


def _choose_encoder(kind: Kind, *, indexed: bool) -> ValueEncoder:
    if kind is Kind.TEXT:
        return _encode_indexed_text if indexed else _encode_text
    return _ENCODERS[kind]


def _encode_text(value: object) -> str:
    if value.__class__ is not str:
        value = _json(value).decode()
    return escape_text(value)


def _encode_indexed_text(value: object) -> str:
    text = _encode_text(value)
    if len(text) * 4 > MAX_INDEXED_BYTES and len(text.encode()) > MAX_INDEXED_BYTES:
        raise UnstorableValue(
            f"text of more than {MAX_INDEXED_BYTES} bytes in an indexed column: remove its tag `index`"
        )
    return text


def _encode_boolean(value: object) -> str:
    if value is True:
        return "t"
    if value is False:
        return "f"
    raise UnstorableValue("not a boolean")


def _encode_integer(value: object) -> str:
    if value.__class__ is not int:
        raise UnstorableValue("not an integer")
    if -0x80000000 <= value <= 0x7FFFFFFF:
        return str(value)
    raise UnstorableValue("an integer beyond 32 bits")


def _encode_bigint(value: object) -> str:
    if value.__class__ is str:
        value = int(value)
    if value.__class__ is not int:
        raise UnstorableValue("not an integer")
    if -0x8000000000000000 <= value <= 0x7FFFFFFFFFFFFFFF:
        return str(value)
    raise UnstorableValue("an integer beyond 64 bits")


def _encode_numeric(value: object) -> str:
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
            raise UnstorableValue("a number with more digits than Postgres's numeric stores")
        return text
    if value.__class__ is int:
        return str(value)
    if value.__class__ is float and value == value and abs(value) != float("inf"):
        return repr(value)
    raise UnstorableValue("not a number")


def _encode_date(value: object) -> str:
    if value.__class__ is not str or not _DATE(value):
        raise UnstorableValue("not a date of the form YYYY, YYYY-MM or YYYY-MM-DD")
    return _complete_date(value)


def _complete_date(text: str) -> str:
    if len(text) == 10:
        complete, precision = text, "day"
    elif len(text) == 7:
        complete, precision = f"{text}-01", "month"
    else:
        complete, precision = f"{text}-01-01", "year"
    try:
        date.fromisoformat(complete)
    except ValueError:
        raise UnstorableValue("not a valid date") from None
    return f"{complete}\t{precision}"


def _encode_datetime(value: object) -> str:
    if value.__class__ is not str:
        raise UnstorableValue("not a dateTime")
    return _encode_date(value) if len(value) <= 10 else f"{_check_instant(value)}\tinstant"


def _encode_instant(value: object) -> str:
    if value.__class__ is not str:
        raise UnstorableValue("not a dateTime")
    return _check_instant(value)


def _encode_datetime_with_day(value: object) -> str:
    if value.__class__ is not str:
        raise UnstorableValue("not a dateTime")
    if len(value) > 10:
        return _add_day(value, "\tinstant")
    encoded = _encode_date(value)
    return f"{encoded}\t{encoded[:10]}\t{NULL}"


def _encode_instant_with_day(value: object) -> str:
    if value.__class__ is not str:
        raise UnstorableValue("not a dateTime")
    return _add_day(value, "")


@lru_cache(8192)
def _add_day(text: str, precision: str) -> str:
    """Return the cells of a time: the instant, the given precision, its day and offset as written. Z is ``+00:00``."""
    _check_instant(text)
    offset = "+00:00" if text[-1] == "Z" else text[-6:] if text[-6] in "+-" else NULL
    return f"{text}{precision}\t{text[:10]}\t{offset}"


@lru_cache(8192)
def _check_instant(text: str) -> str:
    """Return the text of an instant unchanged. Cached: consecutive resources often have the same times."""
    if not _DATETIME(text):
        raise UnstorableValue("not a time of the form YYYY-MM-DDThh:mm:ss with a zone")
    if not _is_instant(text) and not _is_instant(_replace_unusual_time(text)):
        raise UnstorableValue("not a valid date and time")
    if text[-6] in "+-" and (text[-5:-3] > "15" or text[-2:] > "59"):
        raise UnstorableValue("not a valid time zone")
    return text


def _replace_unusual_time(text: str) -> str:
    """Return an instant that Python can parse: a leap second and 24:00:00, which Postgres stores, are replaced."""
    if text[16:19] == ":60":
        return f"{text[:17]}59{text[19:]}"
    return f"{text[:11]}00{text[13:]}" if _END_OF_DAY(text, 11) else text


def _is_instant(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _encode_time(value: object) -> str:
    if value.__class__ is not str or not _TIME(value):
        raise UnstorableValue("not a time of the form hh:mm:ss")
    text: str = value
    if (text[:2] > "23" and not _END_OF_DAY(text)) or text[3:5] > "59" or text[6:8] > "60":
        raise UnstorableValue("not a valid time")
    return text


def _encode_json(value: object) -> str:
    encoded = _json(value)
    if b"\\u" in encoded:
        check_escapes(encoded)
    return encoded.decode().replace("\\", "\\\\")


def _encode_array(value: object) -> str:
    if not isinstance(value, list | tuple):
        raise UnstorableValue("not a collection")
    return escape_text("{" + ",".join([_encode_element(element) for element in value]) + "}")


def _encode_element(value: object) -> str:
    if value is None:
        return "NULL"
    text = value if isinstance(value, str) else _json(value).decode()
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'


_TEXT_ENCODERS: tuple[ValueEncoder, ...] = (_encode_text, _encode_indexed_text)


def _plain_text_branch(name: str) -> str:
    """Return the first branch of a conditional expression, for text that needs no escaping."""
    plain = f"len({name}) < {MAX_INDEXED_BYTES // 4} and {name}.isprintable() and backslash not in {name}"
    return f"{name} if {name}.__class__ is str and {plain} else "


_ENCODERS: dict[Kind, ValueEncoder] = {
    Kind.BOOLEAN: _encode_boolean,
    Kind.INTEGER: _encode_integer,
    Kind.BIGINT: _encode_bigint,
    Kind.NUMERIC: _encode_numeric,
    Kind.DATE: _encode_date,
    Kind.DATETIME: _encode_datetime,
    Kind.INSTANT: _encode_instant,
    Kind.TIME: _encode_time,
    Kind.JSON: _encode_json,
    Kind.TEXTS: _encode_array,
}
_ENCODERS_WITH_DAY: dict[Kind, ValueEncoder] = {
    Kind.DATETIME: _encode_datetime_with_day,
    Kind.INSTANT: _encode_instant_with_day,
}
