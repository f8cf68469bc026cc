"""Functions of single values: strings, conversion and arithmetic (FHIRPath sections 5.5 to 5.7, 6.6).

None represents the empty collection.
"""

import base64
import binascii
import html
import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal, DecimalException
from functools import cache
from typing import Any

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.path import date_times
from fhir_assets.fhir.path.equality import Number, exact, is_number


@cache
def pattern(text: str) -> re.Pattern[str]:
    """Compile a FHIRPath regular expression. Raises FhirPathError if it is invalid."""
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise FhirPathError(f'"{text}" is not a regular expression: {error}') from None


def matches(text: str, regex: str) -> bool:
    """Return True if a part of the text matches (``matches()``)."""
    return pattern(regex).search(text) is not None


def matches_full(text: str, regex: str) -> bool:
    """Return True if the entire text matches (``matchesFull()``)."""
    return pattern(regex).fullmatch(text) is not None


def replace_matches(text: str, regex: str, by: str) -> str:
    """Replace each match (``replaceMatches()``); ``$1`` in the replacement refers to a group."""
    return pattern(regex).sub(re.sub(r"\$(\d+)", r"\\\1", by), text)


def substring(text: str, start: int, length: int | None = None) -> str | None:
    """Return at most ``length`` characters from an index on; None if the index is outside the text."""
    if not 0 <= start < len(text):
        return None
    return text[start:] if length is None else text[start : start + max(length, 0)]


def encode(text: str, form: str) -> str | None:
    """Encode text as ``hex``, ``base64`` or ``urlbase64``; None for any other format."""
    match form:
        case "hex":
            return text.encode().hex()
        case "base64":
            return base64.b64encode(text.encode()).decode()
        case "urlbase64":
            return base64.urlsafe_b64encode(text.encode()).decode()
    return None


def decode(text: str, form: str) -> str | None:
    """Decode text that ``encode`` encoded; None if the text does not have the format."""
    try:
        match form:
            case "hex":
                return bytes.fromhex(text).decode()
            case "base64":
                return base64.b64decode(text).decode()
            case "urlbase64":
                return base64.urlsafe_b64decode(text).decode()
    except (ValueError, binascii.Error):
        pass
    return None


def escape(text: str, form: str) -> str | None:
    """Escape text for ``html`` or ``json``; None for any other target."""
    if form == "html":
        return html.escape(text)
    return text.replace("\\", "\\\\").replace('"', '\\"') if form == "json" else None


def concatenate(left: Sequence[str], right: Sequence[str]) -> str:
    """Concatenate two strings with ``&``; an empty operand counts as the empty string.

    Raises FhirPathError if an operand has several values.
    """
    if len(left) > 1 or len(right) > 1:
        raise FhirPathError("several values where one is allowed")
    return "".join((*left, *right))


def to_string(value: Any) -> str | None:
    """Convert a primitive to text, a Quantity to ``value 'unit'``."""
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is dict:
        return (
            f"{exact(value['value'])} '{value.get('code') or value.get('unit') or '1'}'" if "value" in value else None
        )
    return f"{exact(value):f}" if is_number(value) else value if type(value) is str else None


def to_integer(value: Any) -> int | None:
    """Convert an integer, a boolean or a string of digits to an integer."""
    if type(value) in (int, bool):
        return int(value)
    return int(value) if type(value) is str and re.fullmatch(r"[+-]?\d+", value) else None


def to_decimal(value: Any) -> Decimal | None:
    """Convert a number, a boolean or a string of digits to a decimal."""
    if type(value) is bool:
        return Decimal(int(value))
    if is_number(value):
        return exact(value)
    return Decimal(value) if type(value) is str and re.fullmatch(r"[+-]?\d+(\.\d+)?", value) else None


_TRUE = {"true", "t", "yes", "y", "1", "1.0"}
_FALSE = {"false", "f", "no", "n", "0", "0.0"}


def to_boolean(value: Any) -> bool | None:
    """Convert a boolean, 0, 1 or a string such as ``true``, ``t``, ``yes`` to a boolean."""
    if type(value) is bool:
        return value
    if is_number(value):
        return {0: False, 1: True}.get(value)
    word = value.lower() if type(value) is str else None
    return True if word in _TRUE else False if word in _FALSE else None


def to_date(value: Any) -> str | None:
    """Return the date part of a date or dateTime."""
    if type(value) is not str:
        return None
    day = value.split("T", 1)[0]
    return day if date_times.is_date_time(value) and date_times.is_date(day) else None


def to_date_time(value: Any) -> str | None:
    """Return a date or dateTime unchanged; None for any other value."""
    return value if type(value) is str and date_times.is_date_time(value) else None


def to_time(value: Any) -> str | None:
    """Return a time of day unchanged; None for any other value."""
    return value if type(value) is str and date_times.is_time(value) else None


def build_converts_to(function: object) -> Callable[[Any], bool]:
    """Return the ``convertsTo…()`` function of a conversion: True if the conversion gives a value."""
    assert callable(function)
    convert = function

    def converts_to(value: Any) -> bool:
        return convert(value) is not None

    return converts_to


def _number(value: Any) -> Decimal:
    if not is_number(value):
        raise FhirPathError("arithmetic needs numbers")
    return exact(value)


def _result(number: Decimal, *operands: Number) -> Number:
    return int(number) if all(type(operand) is int for operand in operands) else number


def add(left: Any, right: Any) -> Number | str:
    """Add two numbers or concatenate two strings (``+``). Raises FhirPathError for other operands."""
    if type(left) is str and type(right) is str:
        return left + right
    return _result(_number(left) + _number(right), left, right)


def subtract(left: Any, right: Any) -> Number:
    """Subtract (``-``). Raises FhirPathError if an operand is not a number."""
    return _result(_number(left) - _number(right), left, right)


def multiply(left: Any, right: Any) -> Number:
    """Multiply (``*``). Raises FhirPathError if an operand is not a number."""
    return _result(_number(left) * _number(right), left, right)


def divide(left: Any, right: Any) -> Number | None:
    """Divide (``/``); None for a division by zero. The result is a decimal of at most 28 digits."""
    divisor = _number(right)
    return _number(left) / divisor if divisor else None


def divide_to_integer(left: Any, right: Any) -> Number | None:
    """Divide and truncate to an integer (``div``); None for a division by zero."""
    divisor = _number(right)
    return int(_number(left) / divisor) if divisor else None


def modulo(left: Any, right: Any) -> Number | None:
    """Return the remainder (``mod``), with the sign of the dividend; None for a division by zero."""
    divisor = _number(right)
    return _result(_number(left) % divisor, left, right) if divisor else None


def negate(value: Any) -> Number | dict[str, Any]:
    """Negate a number or a Quantity (unary ``-``)."""
    if type(value) is dict and "value" in value:
        return value | {"value": -exact(value["value"])}
    return _result(-_number(value), value)


def absolute(value: Any) -> Number:
    """Return the absolute value (``abs()``)."""
    return _result(abs(_number(value)), value)


def ceiling(value: Any) -> int:
    """Round up to an integer (``ceiling()``)."""
    return math.ceil(_number(value))


def floor(value: Any) -> int:
    """Round down to an integer (``floor()``)."""
    return math.floor(_number(value))


def truncate(value: Any) -> int:
    """Round towards zero to an integer (``truncate()``)."""
    return int(_number(value))


def round_(value: Any, places: int = 0) -> Number:
    """Round to a number of decimal places, halves away from zero (``round()``)."""
    return _number(value).quantize(Decimal(1).scaleb(-places), rounding="ROUND_HALF_UP")


def _finite_or_none(number: Decimal, method: str) -> Decimal | None:
    try:
        result: Decimal = getattr(number, method)()
    except DecimalException:
        return None
    return result if result.is_finite() else None


def sqrt(value: Any) -> Decimal | None:
    """Return the square root (``sqrt()``); None for a negative number."""
    return _finite_or_none(_number(value), "sqrt")


def exp(value: Any) -> Decimal | None:
    """Return e to the power of the value (``exp()``)."""
    return _finite_or_none(_number(value), "exp")


def ln(value: Any) -> Decimal | None:
    """Return the natural logarithm (``ln()``); None unless the number is positive."""
    return _finite_or_none(_number(value), "ln")


def log(value: Any, base: Any) -> Decimal | None:
    """Return the logarithm to a base (``log()``); None unless both numbers are positive."""
    top, bottom = ln(value), ln(base)
    return top / bottom if top is not None and bottom else None


def power(value: Any, exponent: Any) -> Number | None:
    """Raise to a power (``power()``); None if the result is not a real number."""
    try:
        return _result(_number(value) ** _number(exponent), value, exponent)
    except DecimalException:
        return None


def now() -> str:
    """Return the current dateTime in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def today() -> str:
    """Return the current date in UTC."""
    return datetime.now(UTC).date().isoformat()


def time_of_day() -> str:
    """Return the current time of day in UTC."""
    return datetime.now(UTC).time().isoformat(timespec="milliseconds")


def comparable(left: Any, right: Any) -> bool:
    """Return True if two quantities have the same unit."""
    return type(left) is dict and type(right) is dict and _unit(left) == _unit(right)


def _unit(quantity: dict[str, Any]) -> object:
    return quantity.get("system"), quantity.get("code") or quantity.get("unit")
