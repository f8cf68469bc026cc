"""The resolved form of a ViewDefinition: its selects, their columns, and the typed paths that fill the columns.

``definition`` builds it from JSON, ``compiled_views`` generates code from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fhir_assets.fhir.path.expressions import Expression, IndexVariable

Iteration = Literal["forEach", "forEachOrNull", "repeat"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a view.

    ``type`` is a FHIR type, declared in the ViewDefinition or inferred from the path, otherwise ``string``. A
    ``collection`` column holds a list of values.
    """

    name: str
    type: str
    collection: bool
    description: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class FilledColumn:
    """A column with the path that fills it."""

    column: Column
    path: Expression


@dataclass(frozen=True, slots=True)
class RepeatPaths:
    """The paths of ``repeat``, resolved twice. A path is omitted if the type does not have its elements.

    ``first`` are the paths on the focus, ``again`` the paths on each element that ``repeat`` has reached.
    """

    first: tuple[Expression, ...]
    again: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Select:
    """A ``select``: its iteration, its own columns, its nested selects and the branches of its ``unionAll``.

    ``over`` is the path of ``forEach`` or ``forEachOrNull``, or the paths of ``repeat``.
    """

    iteration: Iteration | None
    over: Expression | RepeatPaths | None
    filled_columns: tuple[FilledColumn, ...]
    selects: tuple["Select", ...]
    union: tuple["Select", ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """All columns, in the order that the specification defines."""
        return (
            *(filled.column for filled in self.filled_columns),
            *(column for select in self.selects for column in select.columns),
            *(self.union[0].columns if self.union else ()),
        )

    @property
    def indexes(self) -> tuple[bool, ...]:
        """Whether the path of each column is ``%rowIndex``."""
        return (
            *(isinstance(filled.path, IndexVariable) for filled in self.filled_columns),
            *(index for select in self.selects for index in select.indexes),
            *(self.union[0].indexes if self.union else ()),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The filters and selects of a view."""

    where: tuple[Expression, ...]
    selects: tuple[Select, ...]
