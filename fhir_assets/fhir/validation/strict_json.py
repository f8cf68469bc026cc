"""JSON as FHIR needs it: UTF-8, no byte order mark, no duplicate names, no NaN, no bottomless nesting."""

import json
import re
from decimal import Decimal
from typing import Any

import msgspec

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}").fullmatch


class ObjectWithDuplicates(dict[str, Any]):
    """An object in which a name stands twice."""


class InvalidJson(Exception):
    """Why a text is not JSON as FHIR needs it. ``path`` is set where a place in the resource can be named."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else ObjectWithDuplicates(found)


_strict = msgspec.json.Decoder(float_hook=Decimal)
_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_float=Decimal)


def parse_strictly(body: bytes, max_depth: int) -> Any:
    """The value of a JSON text, fractions as Decimal with their digits. Raises BrokenJson."""
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
    """Refuses what is nested too deeply, and objects in which a name repeats."""
    start = root.get("resourceType") if isinstance(root, dict) else None
    waiting = [(root, 1, start if isinstance(start, str) and _NAME(start) else "")]
    while waiting:
        value, depth, path = waiting.pop()
        if depth > max_depth:
            raise InvalidJson(f"the text is nested deeper than {max_depth} levels")
        if isinstance(value, ObjectWithDuplicates):
            raise InvalidJson("a name stands twice in this object", path)
        if isinstance(value, dict):
            waiting += [
                (child, depth + 1, child_path(path, name))
                for name, child in value.items()
                if isinstance(child, (dict, list))
            ]
        elif isinstance(value, list):
            waiting += [
                (child, depth + 1, f"{path}[{n}]") for n, child in enumerate(value) if isinstance(child, (dict, list))
            ]


def child_path(path: str, name: str) -> str:
    """The path of a property; one whose name could be data, not a name, is reported at its parent."""
    return f"{path}.{name}" if _NAME(name) else path
