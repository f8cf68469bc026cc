"""The table layout of a view: its columns with their types, the columns that are added, keys, indexes and comments.

The module ``view_tables`` creates and changes the tables.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from fhir_assets.catalog import BY_NAME
from fhir_assets.errors import ViewError
from fhir_assets.fhir.views import Column, View
from fhir_assets.fhir.views.row_identity import find_identity, find_key_column, find_reference_columns

KEY_COLUMN = "_resource_key"
"""The column with the id of the row's resource, in tables of views that have no column ``getResourceKey()``."""

LOADED_AT_COLUMN = "loaded_at"
"""The column with the time at which the row was loaded, unless the view has a column of this name."""

LAST_UPDATED_COLUMN = "last_updated"
"""A column with ``meta.lastUpdated``, the only instant without day columns, because it is on the server's clock."""

KEY_ID_COLUMN = "_key_id"
"""The column with the id of the key that encrypts the row. It exists in tables with patient data if keys are set."""

SOURCE_COLUMN = "_source"
"""The column with the key of the source of the row. Its default is the source of the session."""

_MAX_NAME_BYTES = 63
_MAX_COLUMNS = 1600
_SYSTEM_COLUMNS = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
"""The columns that every table of Postgres has (https://www.postgresql.org/docs/current/ddl-system-columns.html)."""

_RESERVED_NAMES = frozenset({"resource", "deleted"})
BLIND_INDEX_SUFFIX = "_index"
_INDEX_METHODS = frozenset({"btree", "hash", "gin", "brin"})


def get_key_column(view: View) -> str:
    """Return the column of a view's table with the id of the row's resource."""
    return find_key_column(view) or KEY_COLUMN


class Kind(StrEnum):
    """The kind of values of a column, which determines its Postgres type and its encoding."""

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


_POSTGRES_TYPES = {
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
_TEXT_TYPES = frozenset(
    {"string", "code", "id", "uri", "url", "canonical", "oid", "uuid", "markdown", "base64Binary", "xhtml"}
    | {"date", "dateTime", "instant", "time"}
)
_SCALAR_KINDS = {
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
"""Kinds whose values may be partial dates, such as 2024-05. Each such column is followed by ``<column>_precision``."""

_TIME_KINDS = frozenset({Kind.DATETIME, Kind.INSTANT})


def has_day_columns(view: View, column: Column) -> bool:
    """Return whether a column is followed by ``<column>_date`` and ``<column>_offset``: its day and offset as written.

    A time is stored as an instant, whose day depends on the time zone of the session. Columns of the view with these
    names take precedence.
    """
    if column.name == LAST_UPDATED_COLUMN or column_kind(column) not in _TIME_KINDS:
        return False
    return not {f"{column.name}_date", f"{column.name}_offset"} & {other.name for other in view.columns}


def column_kind(column: Column) -> Kind:
    """Return the kind of a view's column.

    A single primitive is stored by its type, a collection of texts as text[], and all other values as jsonb.
    """
    if column.collection:
        return Kind.TEXTS if column.type in _TEXT_TYPES else Kind.JSON
    if column.type in _SCALAR_KINDS:
        return _SCALAR_KINDS[column.type]
    return Kind.TEXT if column.type in _TEXT_TYPES else Kind.JSON


class PhiTreatment(StrEnum):
    """The protection of a column's values in a deployment with encryption keys, given by the column's tag ``phi``."""

    NONE = "none"
    """Not encrypted."""

    ENCRYPT = "encrypt"
    """Stored as a token. With ``has_blind_index``, a column ``<column>_index`` contains a hash for searches."""

    HASH = "hash"
    """Replaced by the blind index of the value, which can be joined and counted but not decrypted."""

    YEAR = "year"
    """A date, replaced by the first of January of its year."""

    DROP = "drop"
    """Replaced by null."""


def phi_treatment(column: Column, *, encrypted: bool) -> PhiTreatment:
    """Return the treatment of a column; NONE if ``encrypted`` is false. Raises ViewError for an unknown tag."""
    tag = column.tags.get("phi", "none")
    try:
        treatment = PhiTreatment(tag)
    except ValueError:
        raise ViewError(
            f"column {column.name}: tag phi is {tag}, but must be one of {', '.join(PhiTreatment)}"
        ) from None
    return treatment if encrypted else PhiTreatment.NONE


def has_blind_index(column: Column) -> bool:
    """Return True if an encrypted column can be searched by equality: it is tagged ``phi-index`` or ``index``."""
    return "phi-index" in column.tags or "index" in column.tags


def holds_phi(view: View) -> bool:
    """Return True if the table of a view contains patient data: a column has a treatment other than NONE."""
    return any(phi_treatment(column, encrypted=True) is not PhiTreatment.NONE for column in view.columns)


def column_type(column: Column, *, encrypted: bool = False) -> str:
    """Return the Postgres type of a view's column."""
    if phi_treatment(column, encrypted=encrypted) in _STORED_AS_TEXT:
        return "text"
    return _POSTGRES_TYPES[column_kind(column)]


_STORED_AS_TEXT = frozenset({PhiTreatment.ENCRYPT, PhiTreatment.HASH})
_TREATMENT_COMMENTS = {
    PhiTreatment.ENCRYPT: "encrypted: a token that belongs to this row",
    PhiTreatment.HASH: "a keyed hash of the value",
    PhiTreatment.YEAR: "cut to the year",
    PhiTreatment.DROP: "left out",
}


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A column of a table. ``index`` is the access method of its index, None without an index."""

    name: str
    type: str
    description: str | None = None
    index: str | None = None
    required: bool = False


@dataclass(frozen=True, slots=True)
class TableLayout:
    """The table of a view. ``columns`` are in the order in which rows are copied."""

    name: str
    resource_type: str
    description: str | None
    columns: tuple[TableColumn, ...]
    key: str
    """The column with the id of the row's resource."""
    identity: tuple[str, ...]
    """The columns of the primary key other than the source; empty if several rows may have the same values."""
    loaded_at: tuple[TableColumn, ...]
    """The column that a default fills with the time of the load; empty if the view has a column of this name."""
    fingerprint: str
    """The fingerprint of the view and its treatments. Rows that were built with another fingerprint are outdated."""

    @property
    def readable_columns(self) -> tuple[TableColumn, ...]:
        """The columns for readers: all but that of the source."""
        return (*self.columns, *self.loaded_at)

    @property
    def shape(self) -> str:
        """A hash of the columns, keys, indexes and comments."""
        text = repr((self.name, self.resource_type, self.description, self.readable_columns, self.key, self.identity))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_layout(view: View, *, encrypted: bool = False) -> TableLayout:
    """Return the layout of a view's table. ``encrypted`` is True in a deployment with keys.

    Raises ViewError, which names the view, if a name cannot be the name of a table or of a column, if the table would
    have too many columns, or if a tag is not valid.
    """
    if view.name in _RESERVED_NAMES or view.name.startswith("resource_"):
        raise ViewError(f"view {view.name}: this name belongs to a relation of fhir_assets; rename the view")
    _check_length(view.name, f"view {view.name}")
    key = find_key_column(view)
    identity = find_identity(view)
    targets = find_targets(view, key)
    columns = []
    if key is None:
        key = KEY_COLUMN
        columns.append(TableColumn(key, "text", "Logical id of the resource of the row", "btree", True))
    for column in view.columns:
        kind = column_kind(column)
        try:
            phi = phi_treatment(column, encrypted=encrypted)
        except ViewError as error:
            raise ViewError(f"view {view.name}, {error}") from None
        stored_kind = Kind.TEXT if phi in _STORED_AS_TEXT else kind
        index = None if phi in (PhiTreatment.ENCRYPT, PhiTreatment.DROP) else _choose_index(view, column, stored_kind)
        if column.name == key:
            index = None if identity else "btree"
        comment = _build_comment(column, phi, targets.get(column.name))
        required = column.name in identity
        columns.append(TableColumn(column.name, _POSTGRES_TYPES[stored_kind], comment, index, required))
        if phi is PhiTreatment.ENCRYPT and has_blind_index(column):
            comment = f"Blind index of {column.name}: equal values have equal indexes"
            columns.append(TableColumn(f"{column.name}{BLIND_INDEX_SUFFIX}", "text", comment, "btree"))
        if stored_kind in PARTIAL_DATE_KINDS:
            grain = "year, month or day" if kind is Kind.DATE else "year, month, day or instant"
            columns.append(TableColumn(f"{column.name}_precision", "text", f"Precision of {column.name}: {grain}"))
        if stored_kind in _TIME_KINDS and has_day_columns(view, column):
            columns += _build_day_columns(column)
    if encrypted and holds_phi(view):
        columns.append(TableColumn(KEY_ID_COLUMN, "text", "Id of the key that encrypts the row; null: not encrypted"))
    loaded_at: tuple[TableColumn, ...] = ()
    if LOADED_AT_COLUMN not in {column.name for column in columns}:
        loaded_at = (TableColumn(LOADED_AT_COLUMN, _POSTGRES_TYPES[Kind.INSTANT], _LOADED_AT, required=True),)
    _check_names(view, [column.name for column in (*columns, *loaded_at)])
    fingerprint = f"{view.fingerprint}/{_hash_treatments(view)}" if encrypted else view.fingerprint
    return TableLayout(
        view.name, view.resource_type, view.description, tuple(columns), key, identity, loaded_at, fingerprint
    )


_LOADED_AT = "Start of the transaction that wrote the row, which readers see when it ends"


def find_targets(view: View, key: str | None) -> dict[str, str]:
    """Return the table to whose column ``id`` each key of the view leads. ``key`` is that of the resource."""
    types = {column.column: column.target for column in find_reference_columns(view)}
    if key is not None and view.resource_type in BY_NAME and view.name != BY_NAME[view.resource_type].key:
        types[key] = view.resource_type
    return {name: BY_NAME[target].key for name, target in types.items() if target in BY_NAME}


def _build_day_columns(column: Column) -> tuple[TableColumn, TableColumn]:
    name = column.name
    return (
        TableColumn(f"{name}_date", "date", f"Day of {name} as written at the source, in any time zone"),
        TableColumn(
            f"{name}_offset",
            "text",
            f"Offset of {name} from UTC as written, such as -05:00; null for a date without time",
        ),
    )


def _check_names(view: View, names: Sequence[str]) -> None:
    """Raise ViewError if a table cannot have these columns in addition to that of the source."""
    if len(names) + 1 > _MAX_COLUMNS:
        raise ViewError(
            f"view {view.name}: its table would have {len(names) + 1} columns, with those of precisions, indexes and "
            f"keys; a table in Postgres has at most {_MAX_COLUMNS}: split the view"
        )
    seen = {SOURCE_COLUMN}
    for name in names:
        _check_length(name, f"view {view.name}, column {name}")
        if name in _SYSTEM_COLUMNS:
            raise ViewError(
                f"view {view.name}: no column can be named {name}, because every table in Postgres has a system column "
                "of that name; rename it"
            )
        if name in seen:
            raise ViewError(f"view {view.name}: two columns of its table would be named {name}; rename one")
        seen.add(name)


def _build_comment(column: Column, phi: PhiTreatment, target: str | None) -> str | None:
    notes = []
    if phi is not PhiTreatment.NONE:
        notes.append(_TREATMENT_COMMENTS[phi])
    elif phi_treatment(column, encrypted=True) is not PhiTreatment.NONE:
        notes.append("patient data")
    if target is not None:
        notes.append(f"-> fhir.{target}.id")
    return f"{column.description or column.name} ({'; '.join(notes)})" if notes else column.description


def _hash_treatments(view: View) -> str:
    text = repr([(column.name, phi_treatment(column, encrypted=True).value) for column in view.columns])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _choose_index(view: View, column: Column, kind: Kind) -> str | None:
    method = column.tags.get("index")
    if method is None:
        return None
    if method not in _INDEX_METHODS:
        raise ViewError(
            f"view {view.name}, column {column.name}: tag index is {method}, "
            f"but must be one of {', '.join(sorted(_INDEX_METHODS))}"
        )
    if kind in (Kind.JSON, Kind.TEXTS):
        return "gin"
    return method if method != "gin" else "btree"


def _check_length(name: str, owner: str) -> None:
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise ViewError(f"{owner}: a name in Postgres has at most {_MAX_NAME_BYTES} bytes; shorten it")
