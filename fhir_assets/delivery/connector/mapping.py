"""From rows to FHIR resources, by a template: ``mapping.json``, or the file CONNECTOR_MAPPING names.

A template is shaped like the resource. In it ``"$column"`` is a column's value; ``{"$each": child, …}`` one object a
row of a child table; ``{"$code": column, "codes": {…}, "else": …}`` a code, looked up in lower case; ``{"$unless":
column, "value": …}`` a value where that column is empty. What is empty is left out, and so is an object whose columns
are all empty, whatever constants it has. Equal entries of a list become one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fhir_assets.errors import ConfigurationError

Row = Mapping[str, Any]

BUILT_IN = Path(__file__).with_name("mapping.json")


class Identifier(msgspec.Struct, frozen=True):
    """A business identifier: what a conditional update asks for."""

    system: str
    value: str

    @property
    def token(self) -> str:
        """As a token search parameter (https://hl7.org/fhir/R4/search.html#token), with ``\\``, ``|``, ``,`` and ``$``
        escaped."""
        return f"{_escaped(self.system)}|{_escaped(self.value)}"


class IdentifierColumns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The main table's columns that hold the identifier of its record."""

    system: str
    value: str


class Child(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table with rows that belong to a record: ``key`` holds the record's key, ``order`` sorts them."""

    table: str
    key: str
    order: str


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"resource_type": "type"}):
    """A main table whose rows become resources of one type."""

    name: str
    resource_type: str
    table: str
    key: str
    identifier: IdentifierColumns
    resource: dict[str, Any]
    children: dict[str, Child] = {}

    def identifier_of(self, row: Row) -> Identifier | None:
        """The row's identifier; None if one of its halves is empty."""
        system, value = row.get(self.identifier.system), row.get(self.identifier.value)
        if not system or not value or not str(system).strip() or not str(value).strip():
            return None
        return Identifier(str(system), str(value))

    def to_resource(self, row: Row, children: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
        """The FHIR resource, without an id, that a row and its children make."""
        made, _ = _fill(self.resource, row, children)
        return {"resourceType": self.resource_type, **(made or {})}


class _File(msgspec.Struct, forbid_unknown_fields=True):
    sources: list[Source]


def load_mapping(path: Path = BUILT_IN) -> dict[str, Source]:
    """The sources of a mapping file, by name. Raises ConfigurationError that says what is wrong with it, and where."""
    try:
        sources = msgspec.json.decode(path.read_bytes(), type=_File).sources
    except OSError as error:
        raise ConfigurationError(
            f"the mapping {path} cannot be read ({error.strerror}): set CONNECTOR_MAPPING"
        ) from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"the mapping {path} is not as it should be: {error}") from None
    for source in sources:
        for name in _children_named(source.resource):
            if name not in source.children:
                raise ConfigurationError(
                    f"the mapping {path}: source {source.name} has no child {name!r}, but its template asks for it"
                )
    return {source.name: source for source in sources}


def columns(template: object) -> set[str]:
    """The names of the columns that a template reads, those of its children too."""
    if isinstance(template, str):
        return {template[1:]} if template.startswith("$") else set()
    if isinstance(template, list):
        return set().union(*(columns(part) for part in template))
    if isinstance(template, dict):
        named = {template[key] for key in ("$code", "$unless") if key in template}
        return named.union(*(columns(part) for key, part in template.items() if not key.startswith("$")))
    return set()


def _children_named(template: object) -> set[str]:
    if isinstance(template, list):
        return set().union(*(_children_named(part) for part in template))
    if isinstance(template, dict):
        own = {template["$each"]} if "$each" in template else set()
        return own.union(*(_children_named(part) for part in template.values()))
    return set()


def _fill(template: Any, row: Row, children: Mapping[str, Sequence[Row]]) -> tuple[Any, bool]:
    """What a template comes to (None if it is empty), and whether a column had a part in it."""
    if isinstance(template, str):
        if not template.startswith("$"):
            return template, False
        value = row.get(template[1:])
        if isinstance(value, str):
            value = value.strip() or None
        return value, value is not None
    if isinstance(template, list):
        return _fill_list(template, row, children)
    if isinstance(template, dict):
        if "$code" in template:
            code = str(row.get(template["$code"]) or "").strip().lower()
            value = template["codes"].get(code, template.get("else")) if code else None
            return value, value is not None
        if "$unless" in template:
            return _fill(template["value"], row, children) if row.get(template["$unless"]) is None else (None, False)
        return _fill_object(template, row, children)
    return template, False


def _fill_list(template: list[Any], row: Row, children: Mapping[str, Sequence[Row]]) -> tuple[Any, bool]:
    entries: list[Any] = []
    any_column = False
    for part in template:
        each = part.get("$each") if isinstance(part, dict) else None
        for source in (row,) if each is None else children[each]:
            value, has_column = _fill(part, source, children)
            any_column |= has_column
            if value is not None and value not in entries:
                entries.append(value)
    return entries or None, any_column


def _fill_object(template: dict[str, Any], row: Row, children: Mapping[str, Sequence[Row]]) -> tuple[Any, bool]:
    filled: dict[str, Any] = {}
    any_column = False
    for name, part in template.items():
        if not name.startswith("$"):
            value, has_column = _fill(part, row, children)
            any_column |= has_column
            if value is not None:
                filled[name] = value
    if any_column or not columns(template):
        return filled or None, any_column
    return None, False


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace(",", "\\,").replace("$", "\\$")
