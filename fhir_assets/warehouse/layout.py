"""From a ViewDefinition's columns to a table's: types, precision columns, indexes, comments."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from fhir_assets.errors import ViewError
from fhir_assets.fhir.views import Column, View

KEY_COLUMN = "_resource_key"
_LONGEST_NAME = 63
_RESERVED = "resource"
_METHODS = frozenset({"btree", "hash", "gin", "brin"})


class Kind(StrEnum):
    """How a value is written for Postgres."""

    TEXT = "text"
    BOOLEAN = "boolean"
    INTEGER = "integer"
    BIGINT = "bigint"
    NUMERIC = "numeric"
    DATE = "date"
    DATETIME = "dateTime"
    INSTANT = "instant"
    TIME = "time"
    JSON = "json"
    TEXTS = "texts"


_POSTGRES = {
    Kind.TEXT: "text",
    Kind.BOOLEAN: "boolean",
    Kind.INTEGER: "integer",
    Kind.BIGINT: "bigint",
    Kind.NUMERIC: "numeric",
    Kind.DATE: "date",
    Kind.DATETIME: "timestamp with time zone",
    Kind.INSTANT: "timestamp with time zone",
    Kind.TIME: "time without time zone",
    Kind.JSON: "jsonb",
    Kind.TEXTS: "text[]",
}
_TEXTUAL = frozenset(
    {"string", "code", "id", "uri", "url", "canonical", "oid", "uuid", "markdown", "base64Binary", "xhtml"}
    | {"date", "dateTime", "instant", "time"}
)
_SCALARS = {
    "boolean": Kind.BOOLEAN,
    "integer": Kind.INTEGER,
    "positiveInt": Kind.INTEGER,
    "unsignedInt": Kind.INTEGER,
    "integer64": Kind.BIGINT,
    "decimal": Kind.NUMERIC,
    "date": Kind.DATE,
    "dateTime": Kind.DATETIME,
    "instant": Kind.INSTANT,
    "time": Kind.TIME,
}
PARTIAL = frozenset({Kind.DATE, Kind.DATETIME})
"""Kinds that may be known to the year or month only, and so have a ``<column>_precision`` beside them."""


def kind_of(column: Column) -> Kind:
    """How the values of a view's column are kept: typed if it is a single primitive, else as text[] or jsonb."""
    if column.collection:
        return Kind.TEXTS if column.type in _TEXTUAL else Kind.JSON
    if column.type in _SCALARS:
        return _SCALARS[column.type]
    return Kind.TEXT if column.type in _TEXTUAL else Kind.JSON


def column_type(column: Column) -> str:
    """The Postgres type of a view's column."""
    return _POSTGRES[kind_of(column)]


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A column of a table. ``index`` is the access method of its index, None if it has none."""

    name: str
    type: str
    description: str | None = None
    index: str | None = None
    required: bool = False


@dataclass(frozen=True, slots=True)
class TableLayout:
    """A view's table: ``columns`` in the order that rows are copied in."""

    name: str
    resource_type: str
    description: str | None
    columns: tuple[TableColumn, ...]
    meaning: str
    """The view's fingerprint: rows made under another one are stale."""

    @property
    def shape(self) -> str:
        """Changes with the columns, indexes and comments."""
        text = repr((self.name, self.resource_type, self.description, self.columns))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def layout_of(view: View) -> TableLayout:
    """The table of a view. Raises ViewError if a name cannot be a table's or a column's."""
    if view.name == _RESERVED or view.name.startswith(f"{_RESERVED}_"):
        raise ViewError(f"view {view.name}: this name belongs to fhir.{_RESERVED}; give the view another one")
    _check_length(view.name, f"view {view.name}")
    columns = [TableColumn(KEY_COLUMN, "text", "Logical id of the resource that the row is made of", "btree", True)]
    for column in view.columns:
        kind = kind_of(column)
        columns.append(TableColumn(column.name, _POSTGRES[kind], column.description, _index(view, column, kind)))
        if kind in PARTIAL:
            grain = "year, month or day" if kind is Kind.DATE else "year, month, day or instant"
            columns.append(TableColumn(f"{column.name}_precision", "text", f"What {column.name} is known to: {grain}"))
    seen: set[str] = set()
    for each in columns:
        _check_length(each.name, f"view {view.name}, column {each.name}")
        if each.name in seen:
            raise ViewError(f"view {view.name}: two columns of its table would be named {each.name}; rename one")
        seen.add(each.name)
    return TableLayout(view.name, view.resource_type, view.description, tuple(columns), view.fingerprint)


def _index(view: View, column: Column, kind: Kind) -> str | None:
    method = column.tags.get("index")
    if method is None:
        return None
    if method not in _METHODS:
        raise ViewError(
            f"view {view.name}, column {column.name}: tag index is {method}, "
            f"but must be one of {', '.join(sorted(_METHODS))}"
        )
    if kind in (Kind.JSON, Kind.TEXTS):
        return "gin"
    return method if method != "gin" else "btree"


def _check_length(name: str, place: str) -> None:
    if len(name.encode()) > _LONGEST_NAME:
        raise ViewError(f"{place}: a name in Postgres has at most {_LONGEST_NAME} bytes; shorten it")
