"""JSON Schemas of intake records, and the validation of a record against them."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

SchemaName = Literal["visit", "patient_record", "observation_record", "clinical_record"]

_TRIMMED_TEXT = r"^[^\s\u0000-\u001f]([^\u0000-\u001f]*[^\s\u0000-\u001f])?$(?!\n)"
_PATTERN_MESSAGES = {
    _TRIMMED_TEXT: "must not begin or end with a blank, and must not contain control characters",
    r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f]*$": "must not contain control characters",
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$(?!\n)": "must be a date such as 2024-02-29",
}
"""Messages for patterns that are hard to read."""


@dataclass(frozen=True, slots=True)
class SchemaError:
    """An error of a record. ``path`` is a JSON Pointer into the record; ``message`` states the expected value."""

    path: str
    message: str


@cache
def load_schema(name: SchemaName) -> Mapping[str, Any]:
    """Return the content of a schema file."""
    content: dict[str, Any] = orjson.loads(files(__package__).joinpath(f"{name}.schema.json").read_bytes())
    return content


def find_errors(name: SchemaName, record: object) -> list[SchemaError]:
    """Return all errors of a record, sorted by path. No message contains a value of the record."""
    schema_errors = {
        SchemaError("".join(f"/{part}" for part in error.absolute_path), message)
        for error in _validator(name).iter_errors(record)
        for message in _describe(error)
    }
    return sorted(schema_errors, key=lambda error: (error.path, error.message))


def compile_text_check(name: SchemaName) -> Callable[[Mapping[str, str]], bool]:
    """Compile a schema whose members are all strings into a function that returns whether an object is valid.

    The function accepts the same objects as ``find_errors`` and is about fifty times as fast.
    """
    properties = load_schema(name)["properties"]
    required = frozenset(load_schema(name)["required"])
    rules = {field: _compile_text_rule(rule) for field, rule in properties.items()}

    def fits(row: Mapping[str, str]) -> bool:
        try:
            return required <= row.keys() and all(rules[field](text) for field, text in row.items())
        except KeyError:
            return False

    return fits


def _compile_text_rule(rule: Mapping[str, Any]) -> Callable[[str], bool]:
    supported = {"type", "minLength", "maxLength", "pattern", "format", "description"}
    assert rule["type"] == "string"
    assert rule.keys() <= supported, "the schema contains a keyword that this function does not support"
    matches = re.compile(rule["pattern"]).search
    min_length, max_length, is_date = (
        rule.get("minLength", 0),
        rule.get("maxLength", sys.maxsize),
        rule.get("format") == "date",
    )
    return lambda text: (
        min_length <= len(text) <= max_length and bool(matches(text)) and (not is_date or _is_date(text))
    )


def _is_date(text: str) -> bool:
    try:
        return bool(date.fromisoformat(text))
    except ValueError:
        return False


@cache
def _validator(name: SchemaName) -> Draft202012Validator:
    return Draft202012Validator(load_schema(name), format_checker=Draft202012Validator.FORMAT_CHECKER)


def _describe(error: ValidationError) -> Iterator[str]:
    """Yield messages that describe an error in terms of the schema, without values of the record."""
    rule: str = str(error.validator)
    expected: Any = error.validator_value
    instance: Any = error.instance
    schema: Any = error.schema
    if rule == "required":
        yield from (f"{name} is required" for name in expected if name not in instance)
    elif rule == "additionalProperties":
        yield f"only these fields are known: {', '.join(schema['properties'])}"
    elif rule == "type":
        yield f"must be of type {expected if isinstance(expected, str) else ' or '.join(expected)}"
    elif rule == "format":
        yield f"must be a {expected}, such as 2024-02-29"
    elif rule == "enum":
        yield f"must be one of {', '.join(expected)}"
    elif rule == "const":
        yield f"must be {expected}"
    elif rule == "minLength":
        yield "must not be empty" if expected == 1 else f"must have at least {expected} characters"
    elif rule == "maxLength":
        yield f"must have at most {expected} characters"
    elif rule == "minProperties":
        yield "must not be empty"
    elif rule == "anyOf":
        yield schema["$comment"]
    elif rule == "pattern":
        yield _PATTERN_MESSAGES.get(expected, f"must match {expected}")
    else:
        yield f"violates the rule {rule}"
