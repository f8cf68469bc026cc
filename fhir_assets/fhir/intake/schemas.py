"""The JSON Schemas of what intake takes, and what is wrong with a record: every error, each with its path."""

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

SchemaName = Literal["visit", "patient_record"]

_TRIMMED = r"^[^\s\u0000-\u001f]([^\u0000-\u001f]*[^\s\u0000-\u001f])?$(?!\n)"
_PATTERNS = {
    _TRIMMED: "must neither begin nor end with a blank, and hold no control characters",
    r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f]*$": "must hold no control characters",
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$(?!\n)": "must be a date such as 2024-02-29",
}
"""What a pattern asks for, where its own words are no help."""


@dataclass(frozen=True, slots=True)
class SchemaError:
    """One thing that is wrong: ``path`` is a JSON Pointer into the record, ``message`` what is expected there."""

    path: str
    message: str


@cache
def load_schema(name: SchemaName) -> Mapping[str, Any]:
    """The schema, as it stands in its file."""
    content: dict[str, Any] = orjson.loads(files(__package__).joinpath(f"{name}.schema.json").read_bytes())
    return content


def find_errors(name: SchemaName, record: object) -> list[SchemaError]:
    """All that is wrong with a record, in the order of paths; no message holds a value of the record."""
    found = {
        SchemaError("".join(f"/{part}" for part in error.absolute_path), said)
        for error in _validator(name).iter_errors(record)
        for said in _said(error)
    }
    return sorted(found, key=lambda each: (each.path, each.message))


def compile_text_check(name: SchemaName) -> Callable[[Mapping[str, str]], bool]:
    """Whether an object of texts alone fits a schema of texts alone: what ``errors`` says, some fifty times as fast."""
    properties = load_schema(name)["properties"]
    required = frozenset(load_schema(name)["required"])
    rules = {field: _text_rule(rule) for field, rule in properties.items()}

    def fits(row: Mapping[str, str]) -> bool:
        try:
            return required <= row.keys() and all(rules[field](text) for field, text in row.items())
        except KeyError:
            return False

    return fits


def _text_rule(rule: Mapping[str, Any]) -> Callable[[str], bool]:
    known = {"type", "minLength", "maxLength", "pattern", "format", "description"}
    assert rule["type"] == "string"
    assert rule.keys() <= known, "a rule that is not compiled here"
    matches = re.compile(rule["pattern"]).search
    least, most, is_date = rule.get("minLength", 0), rule.get("maxLength", sys.maxsize), rule.get("format") == "date"
    return lambda text: least <= len(text) <= most and bool(matches(text)) and (not is_date or _is_date(text))


def _is_date(text: str) -> bool:
    try:
        return bool(date.fromisoformat(text))
    except ValueError:
        return False


@cache
def _validator(name: SchemaName) -> Draft202012Validator:
    return Draft202012Validator(load_schema(name), format_checker=Draft202012Validator.FORMAT_CHECKER)


def _said(error: ValidationError) -> Iterator[str]:
    """What is expected, of the schema's words alone."""
    rule: str = str(error.validator)
    expected: Any = error.validator_value
    instance: Any = error.instance
    within: Any = error.schema
    if rule == "required":
        yield from (f"{name} is required" for name in expected if name not in instance)
    elif rule == "additionalProperties":
        yield f"only these fields are known: {', '.join(within['properties'])}"
    elif rule == "type":
        yield f"must be of type {expected}"
    elif rule == "format":
        yield f"must be a {expected}, such as 2024-02-29"
    elif rule == "enum":
        yield f"must be one of {', '.join(expected)}"
    elif rule == "const":
        yield f"must be {expected}"
    elif rule == "minLength":
        yield "must not be empty" if expected == 1 else f"must have {expected} characters at least"
    elif rule == "maxLength":
        yield f"must have {expected} characters at most"
    elif rule == "minProperties":
        yield "must not be empty"
    elif rule == "anyOf":
        yield "must be a text, or an object with first and last"
    elif rule == "pattern":
        yield _PATTERNS.get(expected, f"must match {expected}")
    else:
        yield f"breaks the rule {rule}"
