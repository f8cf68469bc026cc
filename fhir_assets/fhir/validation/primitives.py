"""Checks of the formats of primitive types (https://hl7.org/fhir/R4/datatypes.html#primitive)."""

import binascii
import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal

from fhir_assets.fhir.validation.narrative import Problem, check_xhtml

MAX_STRING = 1024 * 1024
"""The maximum length of a string, in characters."""
MAX_INTEGER = 2**31 - 1

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]").search
_SPACE = re.compile(r"[\s\x00-\x1f]").search
_CODE = re.compile(r"[^\s\x00-\x1f]+( [^\s\x00-\x1f]+)*").fullmatch
_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}").fullmatch
_OID = re.compile(r"urn:oid:[0-2](\.(0|[1-9][0-9]*))+").fullmatch
_UUID = re.compile(r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?"
_ZONE = r"(Z|[+-]((0[0-9]|1[0-3]):[0-5][0-9]|14:00))"
_IS_TIME = re.compile(_TIME).fullmatch
_DATE = re.compile(r"[0-9]{4}(-[0-9]{2}(-[0-9]{2})?)?").fullmatch
_REST = re.compile("T" + _TIME + _ZONE).fullmatch
_BLANKS = re.compile(r"[ \t\r\n]+")

Check = Callable[[str], bool]


def is_string(value: str) -> bool:
    """Return True for text that is not empty, not too long and without control characters."""
    return 0 < len(value) <= MAX_STRING and not _CONTROL(value)


def is_uri(value: str) -> bool:
    """Return True for text that is not empty and without white space."""
    return value != "" and not _SPACE(value)


def is_code(value: str) -> bool:
    """Return True for a code: no white space except single blanks between words."""
    return _CODE(value) is not None


def is_id(value: str) -> bool:
    """Return True for an id: 1 to 64 characters of ``A-Z``, ``a-z``, ``0-9``, ``-`` and ``.``."""
    return _ID(value) is not None


def is_date(value: str) -> bool:
    """Return True for YYYY, YYYY-MM or YYYY-MM-DD that exists in the calendar."""
    if not _DATE(value):
        return False
    try:
        date(int(value[:4]), int(value[5:7] or 1), int(value[8:] or 1))
    except ValueError:
        return False
    return True


def is_instant(value: str) -> bool:
    """Return True for a date with a time and a zone. The time has at least seconds; the leap second 60 is allowed."""
    return len(value) >= 20 and is_date(value[:10]) and _REST(value[10:]) is not None


def is_date_time(value: str) -> bool:
    """Return True for a date or an instant."""
    return is_date(value) if len(value) <= 10 else is_instant(value)


def is_time(value: str) -> bool:
    """Return True for a time of day with at least seconds and without a zone."""
    return _IS_TIME(value) is not None


def is_base64(value: str) -> bool:
    """Return True for base64 of at least one byte; white space is ignored."""
    if not value.isascii():
        return False
    try:
        return len(binascii.a2b_base64(_BLANKS.sub("", value), strict_mode=True)) > 0
    except binascii.Error:
        return False


def is_oid(value: str) -> bool:
    """Return True for an OID as ``urn:oid:…``."""
    return _OID(value) is not None


def is_uuid(value: str) -> bool:
    """Return True for a UUID as ``urn:uuid:…`` in lower case."""
    return _UUID(value) is not None


TEXT: dict[str, tuple[Check, str]] = {
    "Element.id": (is_uri, "a string without white space"),
    "base64Binary": (is_base64, "base64, not empty"),
    "canonical": (is_uri, "a canonical URL without white space"),
    "code": (is_code, "a code: not empty, no white space except single blanks inside"),
    "date": (is_date, "a date that exists: YYYY, YYYY-MM or YYYY-MM-DD"),
    "dateTime": (is_date_time, "a date that exists, with or without a time; a time has seconds and a zone"),
    "id": (is_id, "an id: 1 to 64 characters of A-Z, a-z, 0-9, '-' and '.'"),
    "instant": (is_instant, "an instant: YYYY-MM-DDThh:mm:ss with a zone"),
    "markdown": (is_string, "text, not empty, without control characters, at most 1 MiB"),
    "oid": (is_oid, "an OID as urn:oid:…"),
    "string": (is_string, "text, not empty, without control characters, at most 1 MiB"),
    "time": (is_time, "a time: hh:mm:ss"),
    "uri": (is_uri, "a URI without white space"),
    "url": (is_uri, "a URL without white space"),
    "uuid": (is_uuid, "a UUID as urn:uuid:… in lower case"),
}
"""The primitive types that are strings in JSON: their check, and the expected value for messages."""

INTEGERS = {"integer": -MAX_INTEGER - 1, "unsignedInt": 0, "positiveInt": 1}
"""The primitive types that are integers in JSON, with the minimum of each; the maximum is 2147483647."""


def check_primitive(type_: str, value: object) -> Problem | None:
    """Return the problem of a value of a primitive type, None if it is valid."""
    if type_ in TEXT:
        is_valid, expected = TEXT[type_]
        valid = isinstance(value, str) and is_valid(value)
    elif type_ == "xhtml":
        if isinstance(value, str):
            return check_xhtml(value)
        valid, expected = False, "XHTML in a string"
    elif type_ == "boolean":
        valid, expected = isinstance(value, bool), "true or false, without quotes"
    elif type_ == "decimal":
        valid = isinstance(value, (int, Decimal)) and not isinstance(value, bool)
        expected = "a number, without quotes"
    else:
        least = INTEGERS[type_]
        valid = isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_INTEGER
        expected = f"a whole number from {least} to {MAX_INTEGER}, without quotes"
    return None if valid else ("primitive", f"expected {expected}", "error")
