"""Functions of single values: text, numbers, conversion (FHIRPath sections 5.5 to 5.7). None means empty."""

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
from fhir_assets.fhir.path import moments
from fhir_assets.fhir.path.equality import Number, exact, is_number


@cache
def pattern(text: str) -> re.Pattern[str]:
    """A FHIRPath regular expression, compiled once."""
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise FhirPathError(f'"{text}" is not a regular expression: {error}') from None


def matches(text: str, regex: str) -> bool:
    """Whether a part of the text matches."""
    return pattern(regex).search(text) is not None


def matches_full(text: str, regex: str) -> bool:
    """Whether the whole text matches."""
    return pattern(regex).fullmatch(text) is not None


def replace_matches(text: str, regex: str, by: str) -> str:
    """Each match replaced; ``$1`` in the replacement is a group."""
    return pattern(regex).sub(re.sub(r"\$(\d+)", r"\\\1", by), text)


def substring(text: str, start: int, length: int | None = None) -> str | None:
    """From an index on, at most ``length`` characters; None if the index is outside."""
    if not 0 <= start < len(text):
        return None
    return text[start:] if length is None else text[start : start + max(length, 0)]


def encode(text: str, form: str) -> str | None:
    """``hex``, ``base64`` or ``urlbase64``."""
    match form:
        case "hex":
            return text.encode().hex()
        case "base64":
            return base64.b64encode(text.encode()).decode()
        case "urlbase64":
            return base64.urlsafe_b64encode(text.encode()).decode()
    return None


def decode(text: str, form: str) -> str | None:
    """The opposite of ``encode``; None if it was not encoded so."""
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
    """``html`` or ``json``."""
    if form == "html":
        return html.escape(text)
    return text.replace("\\", "\\\\").replace('"', '\\"') if form == "json" else None


def concatenate(left: Sequence[str], right: Sequence[str]) -> str:
    """``&``: what is empty counts as no text."""
    if len(left) > 1 or len(right) > 1:
        raise FhirPathError("several values where one is allowed")
    return "".join((*left, *right))


def to_string(value: Any) -> str | None:
    """A primitive as text; a Quantity as ``value 'unit'``."""
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is dict:
        return (
            f"{exact(value['value'])} '{value.get('code') or value.get('unit') or '1'}'" if "value" in value else None
        )
    return f"{exact(value):f}" if is_number(value) else value if type(value) is str else None


def to_integer(value: Any) -> int | None:
    """An integer, a boolean or digits as an integer."""
    if type(value) in (int, bool):
        return int(value)
    return int(value) if type(value) is str and re.fullmatch(r"[+-]?\d+", value) else None


def to_decimal(value: Any) -> Decimal | None:
    """A number, a boolean or digits as a decimal."""
    if type(value) is bool:
        return Decimal(int(value))
    if is_number(value):
        return exact(value)
    return Decimal(value) if type(value) is str and re.fullmatch(r"[+-]?\d+(\.\d+)?", value) else None


_TRUE = {"true", "t", "yes", "y", "1", "1.0"}
_FALSE = {"false", "f", "no", "n", "0", "0.0"}


def to_boolean(value: Any) -> bool | None:
    """A boolean, 0, 1 or a word for either."""
    if type(value) is bool:
        return value
    if is_number(value):
        return {0: False, 1: True}.get(value)
    word = value.lower() if type(value) is str else None
    return True if word in _TRUE else False if word in _FALSE else None


def to_date(value: Any) -> str | None:
    """The date part of a date or dateTime."""
    if type(value) is not str:
        return None
    day = value.split("T", 1)[0]
    return day if moments.is_date_time(value) and moments.is_date(day) else None


def to_date_time(value: Any) -> str | None:
    """A date or dateTime as it is."""
    return value if type(value) is str and moments.is_date_time(value) else None


def to_time(value: Any) -> str | None:
    """A time of day as it is."""
    return value if type(value) is str and moments.is_time(value) else None


def converts(function: object) -> Callable[[Any], bool]:
    """``convertsTo…()`` of a conversion: whether it gives a value."""
    assert callable(function)
    convert = function

    def converts_(value: Any) -> bool:
        return convert(value) is not None

    return converts_


def _number(value: Any) -> Decimal:
    if not is_number(value):
        raise FhirPathError("arithmetic needs numbers")
    return exact(value)


def _result(number: Decimal, *operands: Number) -> Number:
    return int(number) if all(type(operand) is int for operand in operands) else number


def add(left: Any, right: Any) -> Number | str:
    """``+`` of numbers or texts."""
    if type(left) is str and type(right) is str:
        return left + right
    return _result(_number(left) + _number(right), left, right)


def subtract(left: Any, right: Any) -> Number:
    """``-``"""
    return _result(_number(left) - _number(right), left, right)


def multiply(left: Any, right: Any) -> Number:
    """``*``"""
    return _result(_number(left) * _number(right), left, right)


def divide(left: Any, right: Any) -> Number | None:
    """``/``, empty for a division by zero; always a decimal, of at most 28 digits."""
    divisor = _number(right)
    return _number(left) / divisor if divisor else None


def whole_divide(left: Any, right: Any) -> Number | None:
    """``div``"""
    divisor = _number(right)
    return int(_number(left) / divisor) if divisor else None


def modulo(left: Any, right: Any) -> Number | None:
    """``mod``, with the sign of the dividend."""
    divisor = _number(right)
    return _result(_number(left) % divisor, left, right) if divisor else None


def negate(value: Any) -> Number | dict[str, Any]:
    """``-`` of a number or a Quantity."""
    if type(value) is dict and "value" in value:
        return value | {"value": -exact(value["value"])}
    return _result(-_number(value), value)


def absolute(value: Any) -> Number:
    """``abs()``"""
    return _result(abs(_number(value)), value)


def ceiling(value: Any) -> int:
    """``ceiling()``"""
    return math.ceil(_number(value))


def floor(value: Any) -> int:
    """``floor()``"""
    return math.floor(_number(value))


def truncate(value: Any) -> int:
    """``truncate()``"""
    return int(_number(value))


def round_(value: Any, places: int = 0) -> Number:
    """``round()``: halves away from zero."""
    return _number(value).quantize(Decimal(1).scaleb(-places), rounding="ROUND_HALF_UP")


def _quiet(number: Decimal, method: str) -> Decimal | None:
    try:
        result: Decimal = getattr(number, method)()
    except DecimalException:
        return None
    return result if result.is_finite() else None


def sqrt(value: Any) -> Decimal | None:
    """``sqrt()``, empty for negative numbers."""
    return _quiet(_number(value), "sqrt")


def exp(value: Any) -> Decimal | None:
    """``exp()``"""
    return _quiet(_number(value), "exp")


def ln(value: Any) -> Decimal | None:
    """``ln()``, empty unless the number is positive."""
    return _quiet(_number(value), "ln")


def log(value: Any, base: Any) -> Decimal | None:
    """``log(base)``"""
    top, bottom = ln(value), ln(base)
    return top / bottom if top is not None and bottom else None


def power(value: Any, exponent: Any) -> Number | None:
    """``power()``, empty where the result is no real number."""
    try:
        return _result(_number(value) ** _number(exponent), value, exponent)
    except DecimalException:
        return None


def now() -> str:
    """The present, as a dateTime in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()


def time_of_day() -> str:
    """The time in UTC."""
    return datetime.now(UTC).time().isoformat(timespec="milliseconds")


def comparable(left: Any, right: Any) -> bool:
    """Whether two quantities are of one unit."""
    return type(left) is dict and type(right) is dict and _unit(left) == _unit(right)


def _unit(quantity: dict[str, Any]) -> object:
    return quantity.get("system"), quantity.get("code") or quantity.get("unit")
