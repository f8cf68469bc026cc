"""From a ViewDefinition's columns to a table's: types, precision columns, indexes, comments."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from fhir_assets.errors import ViewError
from fhir_assets.fhir.views import Column, View

KEY_COLUMN = "_resource_key"
KEY_ID_COLUMN = "_key_id"
"""In tables that hold patient data, where there are keys: which of them sealed the row."""

_LONGEST_NAME = 63
_RESERVED = "resource"
BLIND_INDEX_SUFFIX = "_index"
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
PARTIAL_DATE_KINDS = frozenset({Kind.DATE, Kind.DATETIME})
"""Kinds that may be known to the year or month only, and so have a ``<column>_precision`` beside them."""


def column_kind(column: Column) -> Kind:
    """How the values of a view's column are kept: typed if it is a single primitive, else as text[] or jsonb."""
    if column.collection:
        return Kind.TEXTS if column.type in _TEXTUAL else Kind.JSON
    if column.type in _SCALARS:
        return _SCALARS[column.type]
    return Kind.TEXT if column.type in _TEXTUAL else Kind.JSON


class PhiTreatment(StrEnum):
    """What becomes of a column's values where there are keys: the column's tag ``phi``."""

    NONE = "none"
    """In the clear."""

    ENCRYPT = "encrypt"
    """A Fernet token of the value's text; beside it ``<column>_index``, a hash to search by, if tagged so."""

    HASH = "hash"
    """The value's blind index, in its place: it joins and counts, and cannot be read back."""

    YEAR = "year"
    """The year of a date, as the first of January."""

    DROP = "drop"
    """Null."""


def phi_treatment(column: Column, *, encrypted: bool) -> PhiTreatment:
    """The treatment of a column; all is in the clear unless ``sealed``. Raises ViewError for an unknown tag."""
    tag = column.tags.get("phi", "none")
    try:
        treatment = PhiTreatment(tag)
    except ValueError:
        raise ViewError(
            f"column {column.name}: tag phi is {tag}, but must be one of {', '.join(PhiTreatment)}"
        ) from None
    return treatment if encrypted else PhiTreatment.NONE


def has_blind_index(column: Column) -> bool:
    """Whether an encrypted column is searched by equality: it is tagged ``phi-index``, or ``index``."""
    return "phi-index" in column.tags or "index" in column.tags


def holds_phi(view: View) -> bool:
    """Whether keys change anything about a view's table."""
    return any(phi_treatment(column, encrypted=True) is not PhiTreatment.NONE for column in view.columns)


def column_type(column: Column, *, encrypted: bool = False) -> str:
    """The Postgres type of a view's column."""
    return "text" if phi_treatment(column, encrypted=encrypted) in _AS_TEXT else _POSTGRES[column_kind(column)]


_AS_TEXT = frozenset({PhiTreatment.ENCRYPT, PhiTreatment.HASH})
_SAID = {
    PhiTreatment.ENCRYPT: "encrypted: a Fernet token",
    PhiTreatment.HASH: "a keyed hash of the value",
    PhiTreatment.YEAR: "cut to the year",
    PhiTreatment.DROP: "left out",
}


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


def build_layout(view: View, *, encrypted: bool = False) -> TableLayout:
    """The table of a view, ``sealed`` where there are keys. Raises ViewError if a name cannot be a table's or a
    column's.
    """
    if view.name == _RESERVED or view.name.startswith(f"{_RESERVED}_"):
        raise ViewError(f"view {view.name}: this name belongs to fhir.{_RESERVED}; give the view another one")
    _check_length(view.name, f"view {view.name}")
    columns = [TableColumn(KEY_COLUMN, "text", "Logical id of the resource that the row is made of", "btree", True)]
    for column in view.columns:
        kind = column_kind(column)
        phi = phi_treatment(column, encrypted=encrypted)
        kind_here = Kind.TEXT if phi in _AS_TEXT else kind
        index = None if phi in (PhiTreatment.ENCRYPT, PhiTreatment.DROP) else _index(view, column, kind_here)
        columns.append(TableColumn(column.name, _POSTGRES[kind_here], _described(column, phi), index))
        if phi is PhiTreatment.ENCRYPT and has_blind_index(column):
            said = f"Blind index of {column.name}: the same for equal values"
            columns.append(TableColumn(f"{column.name}{BLIND_INDEX_SUFFIX}", "text", said, "btree"))
        if kind_here in PARTIAL_DATE_KINDS:
            grain = "year, month or day" if kind is Kind.DATE else "year, month, day or instant"
            columns.append(TableColumn(f"{column.name}_precision", "text", f"What {column.name} is known to: {grain}"))
    if encrypted and holds_phi(view):
        columns.append(TableColumn(KEY_ID_COLUMN, "text", "Id of the key that sealed the row; null: not sealed yet"))
    seen: set[str] = set()
    for each in columns:
        _check_length(each.name, f"view {view.name}, column {each.name}")
        if each.name in seen:
            raise ViewError(f"view {view.name}: two columns of its table would be named {each.name}; rename one")
        seen.add(each.name)
    meaning = f"{view.fingerprint}/{_treatments(view)}" if encrypted else view.fingerprint
    return TableLayout(view.name, view.resource_type, view.description, tuple(columns), meaning)


def _described(column: Column, phi: PhiTreatment) -> str | None:
    if phi is PhiTreatment.NONE:
        return column.description
    return f"{column.description or column.name} ({_SAID[phi]})"


def _treatments(view: View) -> str:
    text = repr([(column.name, phi_treatment(column, encrypted=True).value) for column in view.columns])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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
