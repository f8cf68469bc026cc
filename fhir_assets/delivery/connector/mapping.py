"""Maps rows to FHIR resources with a template: ``mapping.json``, or the file that CONNECTOR_MAPPING names.

A template has the shape of the resource. Its placeholders are

- ``"$column"``: the value of a column;
- ``{"$each": child, …}``: one object for each row of a child table;
- ``{"$code": column, "codes": {…}, "else": …}``: the entry of ``codes`` for the value of a column in lower case, or
  ``else`` if ``codes`` has no such entry;
- ``{"$unless": column, "value": …}``: a value that is used only if the column is NULL.

Empty values are omitted. An object whose placeholders are all empty is omitted too, even if it contains constants.
Equal entries of a list are merged.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fhir_assets.errors import ConfigurationError

Row = Mapping[str, Any]

BLANKS = "".join(chr(code) for code in range(0x10000) if chr(code).isspace()) + "\u200b\ufeff"
"""The characters that are removed around every text; ``health.fhir_clean`` in ``sql/outbox.sql`` has the same."""

BUILT_IN = Path(__file__).with_name("mapping.json")


class Identifier(msgspec.Struct, frozen=True):
    """A business identifier, used as the search criterion of a conditional update. It has no surrounding whitespace."""

    system: str
    value: str

    @property
    def token(self) -> str:
        """The identifier as a token search parameter (https://hl7.org/fhir/R4/search.html#token), escaped."""
        return f"{_escape(self.system)}|{_escape(self.value)}"


class IdentifierColumns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The columns of the main table that contain the identifier of a record."""

    system: str
    value: str


class Child(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table whose rows belong to rows of the main table.

    ``key`` names the column with the key of the main table, ``order`` the column by which the rows are sorted.
    """

    table: str
    key: str
    order: str


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"resource_type": "type"}):
    """A main table whose rows are mapped to resources of one type."""

    name: str
    resource_type: str
    table: str
    key: str
    identifier: IdentifierColumns
    resource: dict[str, Any]
    children: dict[str, Child] = {}

    def read_identifier(self, row: Row) -> Identifier | None:
        """Return the identifier of a row, as ``build_resource`` sends it; None if its system or its value is empty."""
        system, value = (_clean(row.get(name)) for name in (self.identifier.system, self.identifier.value))
        return Identifier(str(system), str(value)) if system is not None and value is not None else None

    def build_resource(self, row: Row, children: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
        """Return the FHIR resource, without an id, of a row and its child rows."""
        elements, _ = _fill(self.resource, row, children)
        return {"resourceType": self.resource_type, **(elements or {})}


class _File(msgspec.Struct, forbid_unknown_fields=True):
    sources: list[Source]


def load_mapping(path: Path = BUILT_IN) -> dict[str, Source]:
    """Return the sources of a mapping file by name. Raises ConfigurationError if the file is not valid."""
    try:
        sources = msgspec.json.decode(path.read_bytes(), type=_File).sources
    except OSError as error:
        raise ConfigurationError(
            f"the mapping {path} cannot be read ({error.strerror}): set CONNECTOR_MAPPING"
        ) from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"the mapping {path} is not valid: {error}") from None
    for source in sources:
        for name in _list_child_names(source.resource):
            if name not in source.children:
                raise ConfigurationError(
                    f"the mapping {path}: source {source.name} has no child {name!r}, which its template uses"
                )
    return {source.name: source for source in sources}


def list_columns(template: object) -> set[str]:
    """Return the names of the columns that a template reads, including those of child tables."""
    if isinstance(template, str):
        return {template[1:]} if template.startswith("$") else set()
    if isinstance(template, list):
        return set().union(*(list_columns(part) for part in template))
    if isinstance(template, dict):
        named = {template[key] for key in ("$code", "$unless") if key in template}
        return named.union(*(list_columns(part) for key, part in template.items() if not key.startswith("$")))
    return set()


def _list_child_names(template: object) -> set[str]:
    if isinstance(template, list):
        return set().union(*(_list_child_names(part) for part in template))
    if isinstance(template, dict):
        own = {template["$each"]} if "$each" in template else set()
        return own.union(*(_list_child_names(part) for part in template.values()))
    return set()


def _fill(template: Any, row: Row, children: Mapping[str, Sequence[Row]]) -> tuple[Any, bool]:
    """Return the value of a template, or None if it is empty, and whether the value comes from a column."""
    if isinstance(template, str):
        if not template.startswith("$"):
            return template, False
        value = _clean(row.get(template[1:]))
        return value, value is not None
    if isinstance(template, list):
        return _fill_list(template, row, children)
    if isinstance(template, dict):
        if "$code" in template:
            code = str(row.get(template["$code"]) or "").strip(BLANKS).lower()
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
        child = part.get("$each") if isinstance(part, dict) else None
        for source_row in (row,) if child is None else children[child]:
            value, has_column = _fill(part, source_row, children)
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
    if any_column or not list_columns(template):
        return filled or None, any_column
    return None, False


def _clean(value: Any) -> Any:
    return (value.strip(BLANKS) or None) if isinstance(value, str) else value


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace(",", "\\,").replace("$", "\\$")
