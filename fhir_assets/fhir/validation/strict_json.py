"""A strict JSON parser: UTF-8 only, no byte order mark, no duplicate property names, no NaN, limited nesting."""

import json
import re
from decimal import Decimal
from typing import Any

import msgspec

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}").fullmatch


class ObjectWithDuplicates(dict[str, Any]):
    """A JSON object in which a property name occurs more than once."""


class InvalidJson(Exception):
    """The text is not valid JSON. ``path`` is the element with the error, as FHIRPath, or empty if it is not known."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    properties = dict(pairs)
    return properties if len(properties) == len(pairs) else ObjectWithDuplicates(properties)


_strict = msgspec.json.Decoder(float_hook=Decimal)
_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=Decimal)


def parse_strictly(body: bytes, max_depth: int) -> Any:
    """Parse a JSON text; numbers with a fraction become Decimal and keep their digits.

    Raises InvalidJson if the text is not valid JSON, has duplicate property names, or is nested deeper than
    ``max_depth`` levels.
    """
    if body.startswith(b"\xef\xbb\xbf"):
        raise InvalidJson("the text begins with a byte order mark; send UTF-8 without one")
    try:
        _strict.decode(body)
        value = _decoder.decode(body.decode())
    except UnicodeDecodeError:
        raise InvalidJson("the text is not UTF-8") from None
    except msgspec.DecodeError as error:
        raise InvalidJson(str(error)) from None
    except RecursionError:
        raise InvalidJson(f"the text is nested deeper than {max_depth} levels") from None
    except (ArithmeticError, ValueError):
        raise InvalidJson("a number is too long or out of range") from None
    _check_shape(value, max_depth)
    return value


def _check_shape(root: Any, max_depth: int) -> None:
    """Raise InvalidJson for too deep nesting and for objects with duplicate property names."""
    start = root.get("resourceType") if isinstance(root, dict) else None
    pending = [(root, 1, start if isinstance(start, str) and _NAME(start) else "")]
    while pending:
        value, depth, path = pending.pop()
        if depth > max_depth:
            raise InvalidJson(f"the text is nested deeper than {max_depth} levels")
        if isinstance(value, ObjectWithDuplicates):
            raise InvalidJson("a property name occurs more than once in this object", path)
        if isinstance(value, dict):
            pending += [
                (child, depth + 1, child_path(path, name))
                for name, child in value.items()
                if isinstance(child, (dict, list))
            ]
        elif isinstance(value, list):
            pending += [
                (child, depth + 1, f"{path}[{n}]") for n, child in enumerate(value) if isinstance(child, (dict, list))
            ]


def child_path(path: str, name: str) -> str:
    """Return the path of a property. A name that is not like an element name may be patient data and is omitted."""
    return f"{path}.{name}" if _NAME(name) else path
