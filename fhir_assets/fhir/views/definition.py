"""A ViewDefinition read and resolved: its columns with their types, and the typed paths that fill them.

https://sql-on-fhir.org/ig/StructureDefinition-ViewDefinition.html
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fhir_assets.catalog import snake_case
from fhir_assets.errors import FhirPathError, ViewError
from fhir_assets.fhir.model import r4, suggest_name
from fhir_assets.fhir.path.boolean_expressions import kind
from fhir_assets.fhir.path.compiler import Fallback, resolve_expression
from fhir_assets.fhir.path.expressions import Constant, EmptyCollection, Expression, IndexVariable, Types
from fhir_assets.fhir.path.resolver import resolve_type_name

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_UNTYPED = "string"

Iteration = Literal["forEach", "forEachOrNull", "repeat"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a view. ``type`` is a FHIR type name, declared or inferred from the path (``string`` if neither)."""

    name: str
    type: str
    collection: bool
    description: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Filled:
    """A column and the path that fills it."""

    column: Column
    path: Expression


@dataclass(frozen=True, slots=True)
class Repeated:
    """The paths of ``repeat``: at the focus, and at each element found (one that a type lacks is left out)."""

    first: tuple[Expression, ...]
    again: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Select:
    """One ``select``: what it iterates over, then its own columns, its nested selects and its union."""

    iteration: Iteration | None
    over: Expression | Repeated | None
    filled: tuple[Filled, ...]
    selects: tuple["Select", ...]
    union: tuple["Select", ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """All columns, in the specification's order."""
        return (
            *(filled.column for filled in self.filled),
            *(column for select in self.selects for column in select.columns),
            *(self.union[0].columns if self.union else ()),
        )

    @property
    def indexes(self) -> tuple[bool, ...]:
        """For each column, whether it is ``%rowIndex`` itself."""
        return (
            *(isinstance(filled.path, IndexVariable) for filled in self.filled),
            *(index for select in self.selects for index in select.indexes),
            *(self.union[0].indexes if self.union else ()),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a view does with a resource, resolved."""

    where: tuple[Expression, ...]
    selects: tuple[Select, ...]


@dataclass(frozen=True)
class View:
    """A ViewDefinition. Pickles as its definition, and is resolved again where it arrives."""

    name: str
    resource_type: str
    url: str | None
    version: str | None
    title: str | None
    description: str | None
    columns: tuple[Column, ...]
    path: Path | None
    fingerprint: str
    """Changes with the meaning of the view (columns, paths, filters, constants), not with its descriptions."""
    definition: dict[str, Any] = field(repr=False, hash=False)
    plan: Plan = field(repr=False, compare=False)
    fallbacks: tuple[str, ...] = ()
    """The paths that run in fhirpathpy, much slower than compiled ones."""

    def __reduce__(self) -> tuple[object, ...]:
        return parse_view, (self.definition, self.path)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a ViewDefinition, and where: ``select[0].column[1].path``. A warning does not stop it."""

    location: str
    message: str
    severity: Literal["error", "warning"] = "error"


def parse_view(definition: dict[str, Any], path: Path | None = None) -> View:
    """Read a ViewDefinition. Raises ViewError with the file, the place in it and what is wrong."""
    reader = _Reader(definition, path)
    try:
        view = reader.view()
    except _Stop:
        view = None
    errors = [problem for problem in reader.problems if problem.severity == "error"]
    if view is None or errors:
        raise ViewError(reader.say(errors[0]))
    return view


def check_view(definition: dict[str, Any]) -> list[Problem]:
    """All that is wrong with a ViewDefinition, errors and warnings, in the order of their places."""
    reader = _Reader(definition, None)
    with suppress(_Stop):
        reader.view()
    return reader.problems


class _Stop(Exception):
    """The definition is so wrong that the rest of it cannot be read."""


def fingerprint(definition: dict[str, Any]) -> str:
    """A short hash of what a ViewDefinition means."""
    text = json.dumps(_meaning(definition), sort_keys=True, separators=(",", ":"), default=float)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_MEANINGFUL = {"resource", "name", "path", "type", "collection", "constant", "where", "select", "column"} | {
    "unionAll",
    "forEach",
    "forEachOrNull",
    "repeat",
}


def _meaning(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: _meaning(value)
            for key, value in node.items()
            if key in _MEANINGFUL or (key.startswith("value") and "name" in node)
        }
    return [_meaning(each) for each in node] if isinstance(node, list) else node


class _Reader:
    """Reads one definition, knowing where it is for the errors."""

    def __init__(self, definition: dict[str, Any], path: Path | None) -> None:
        self.definition = definition
        self.path = path
        self.constants: dict[str, Expression] = {"rowIndex": IndexVariable("row_index")}
        self.fallbacks: list[str] = []
        self.problems: list[Problem] = []
        self.resource = ""

    def say(self, problem: Problem) -> str:
        name = self.definition.get("name") if isinstance(self.definition, dict) else None
        where = str(self.path) if self.path else f"view {name}" if isinstance(name, str) else "the ViewDefinition"
        return ": ".join(part for part in (where, problem.location, problem.message) if part)

    def fail(self, location: str, message: str) -> _Stop:
        self.problems.append(Problem(location, message))
        return _Stop()

    def note(self, location: str, message: str, severity: Literal["error", "warning"] = "error") -> None:
        """A problem that does not keep the rest from being read."""
        self.problems.append(Problem(location, message, severity))

    def view(self) -> View:
        definition = self.definition
        if not isinstance(definition, dict):
            raise self.fail("", "is not a JSON object")
        self.resource = self.text(definition, "resource", "")
        type_ = r4().types.get(self.resource)
        if type_ is None or type_.kind != "resource":
            resources = [name for name, each in r4().types.items() if each.kind == "resource"]
            raise self.fail("resource", f'R4 has no resource "{self.resource}"{suggest_name(self.resource, resources)}')
        name = definition.get("name") or (self.path.stem if self.path else snake_case(self.resource))
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise self.fail("name", "must be letters, digits and underscores, and begin with a letter")
        self.read_constants()
        focus: Types = frozenset({self.resource})
        selects = self.selects(definition, "select", "", focus)
        if not selects:
            raise self.fail("select", "is missing: a view needs at least one")
        where = tuple(
            self.condition(node, f"where[{n}]", focus) for n, node in enumerate(self.objects(definition, "where", ""))
        )
        columns = tuple(column for select in selects for column in select.columns)
        self.check_names(columns)
        return View(
            name=name,
            resource_type=self.resource,
            url=definition.get("url"),
            version=definition.get("version"),
            title=definition.get("title"),
            description=definition.get("description"),
            columns=columns,
            path=self.path,
            fingerprint=fingerprint({**definition, "name": name}),
            definition=definition,
            plan=Plan(where, selects),
            fallbacks=tuple(self.fallbacks),
        )

    def check_names(self, columns: Sequence[Column]) -> None:
        if not columns:
            raise self.fail("select", "has no column")
        seen: set[str] = set()
        for column in columns:
            if column.name in seen:
                self.note("select", f'two columns have the name "{column.name}"')
            seen.add(column.name)

    def text(self, node: dict[str, Any], key: str, location: str) -> str:
        value = node.get(key)
        at = f"{location}.{key}" if location else key
        if value is None:
            raise self.fail(at, "is missing")
        if not isinstance(value, str) or not value:
            raise self.fail(at, f"must be text, not {type(value).__name__}")
        return value

    def objects(self, node: dict[str, Any], key: str, location: str) -> list[dict[str, Any]]:
        value = node.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.fail(f"{location}.{key}" if location else key, "must be an array of objects")
        return value

    def read_constants(self) -> None:
        for n, node in enumerate(self.objects(self.definition, "constant", "")):
            location = f"constant[{n}]"
            name = self.text(node, "name", location)
            values = [key for key in node if key.startswith("value")]
            if not _NAME.fullmatch(name) or len(values) != 1:
                raise self.fail(location, "must have a name of letters, digits and underscores, and one value[x]")
            type_ = values[0].removeprefix("value")
            type_ = type_[:1].lower() + type_[1:]
            if not r4().is_primitive(type_) or isinstance(node[values[0]], dict | list | None):
                raise self.fail(f"{location}.{values[0]}", "must be a primitive value: valueString, valueInteger, …")
            self.constants[name] = Constant(node[values[0]], frozenset({type_}))

    def expression(self, text: object, location: str, focus: Types) -> Expression:
        if not isinstance(text, str):
            raise self.fail(location, f"must be a FHIRPath expression, not {type(text).__name__}")
        try:
            expr = self.typed(text, focus)
        except FhirPathError as error:
            self.note(location, str(error))
            return EmptyCollection(many=True, types=None)
        if isinstance(expr, Fallback):
            self.fallbacks.append(text)
            self.note(location, "runs in fhirpathpy, far slower than compiled paths", "warning")
        return expr

    def condition(self, node: dict[str, Any], location: str, focus: Types) -> Expression:
        expr = self.expression(self.text(node, "path", location), f"{location}.path", focus)
        if expr.types is not None and expr.types - {"boolean"}:
            self.note(f"{location}.path", f"must give a boolean, not {' or '.join(sorted(expr.types))}")
        return expr

    def selects(self, node: dict[str, Any], key: str, location: str, focus: Types) -> tuple[Select, ...]:
        prefix = f"{location}.{key}" if location else key
        return tuple(
            self.select(each, f"{prefix}[{n}]", focus) for n, each in enumerate(self.objects(node, key, location))
        )

    def select(self, node: dict[str, Any], location: str, focus: Types) -> Select:
        iterations: list[Iteration] = [key for key in ("forEach", "forEachOrNull", "repeat") if key in node]
        if len(iterations) > 1:
            raise self.fail(location, f"has both {' and '.join(iterations)}: one is allowed")
        iteration = iterations[0] if iterations else None
        over: Expression | Repeated | None = None
        if iteration == "repeat":
            over, focus = self.repeated(node["repeat"], f"{location}.repeat", focus)
        elif iteration:
            over = self.expression(node[iteration], f"{location}.{iteration}", focus)
            focus = over.types
        filled = tuple(
            self.filled(each, f"{location}.column[{n}]", focus)
            for n, each in enumerate(self.objects(node, "column", location))
        )
        selects = self.selects(node, "select", location, focus)
        union = self.selects(node, "unionAll", location, focus)
        if not (filled or selects or union):
            raise self.fail(location, "has neither column nor select nor unionAll")
        for n, branch in enumerate(union[1:], start=1):
            expected, found = ([c.name for c in each.columns] for each in (union[0], branch))
            if found != expected:
                self.note(
                    f"{location}.unionAll[{n}]",
                    f"has the columns {', '.join(found)}; the first has {', '.join(expected)}",
                )
        return Select(iteration, over, filled, selects, union)

    def repeated(self, paths: object, location: str, focus: Types) -> tuple[Repeated, Types]:
        if not isinstance(paths, list) or not paths or not all(isinstance(each, str) for each in paths):
            raise self.fail(location, "must be an array of FHIRPath expressions")
        for n, path in enumerate(paths):
            self.expression(path, f"{location}[{n}]", None)
        first = self.possible(paths, focus)
        types: Types = frozenset().union(*(expr.types or () for expr in first))
        if any(expr.types is None for expr in first):
            types = None
        while True:
            again = self.possible(paths, types)
            if types is None or any(expr.types is None for expr in again):
                return Repeated(first, self.possible(paths, None)), None
            wider = types.union(*(expr.types or () for expr in again))
            if wider == types:
                return Repeated(first, again), types
            types = wider

    def possible(self, paths: Sequence[str], focus: Types) -> tuple[Expression, ...]:
        """The paths that the types of the focus have: not every element that is found need have them all."""
        found: list[Expression] = []
        for path in paths:
            with suppress(FhirPathError):
                expr = self.typed(path, focus)
                if not isinstance(expr, EmptyCollection):
                    found.append(expr)
        return tuple(found)

    def typed(self, text: str, focus: Types) -> Expression:
        return resolve_expression(
            text, focus=focus, root=self.resource, resource=self.resource, constants=self.constants
        )

    def filled(self, node: dict[str, Any], location: str, focus: Types) -> Filled:
        name = self.text(node, "name", location)
        if not _NAME.fullmatch(name):
            raise self.fail(
                f"{location}.name", f'"{name}" must be letters, digits and underscores, and begin with a letter'
            )
        expr = self.expression(self.text(node, "path", location), f"{location}.path", focus)
        collection = node.get("collection", False)
        if not isinstance(collection, bool):
            raise self.fail(f"{location}.collection", f"must be true or false, not {type(collection).__name__}")
        column = Column(
            name=name,
            type=self.type(node.get("type"), f"{location}.type", expr),
            collection=collection,
            description=node.get("description"),
            tags={
                tag["name"]: tag["value"]
                for tag in self.objects(node, "tag", location)
                if {"name", "value"} <= tag.keys()
            },
        )
        return Filled(column, expr)

    def type(self, declared: object, location: str, expr: Expression) -> str:
        """The declared type, else the one that the path gives."""
        inferred = next(iter(expr.types)) if expr.types is not None and len(expr.types) == 1 else None
        if declared is None:
            return inferred or _UNTYPED
        if not isinstance(declared, str):
            raise self.fail(location, f"must be a type name, not {type(declared).__name__}")
        try:
            name = resolve_type_name(declared.rpartition("/")[2])
        except FhirPathError as error:
            self.note(location, str(error))
            return _UNTYPED
        kinds = kind(frozenset({name})), kind(expr.types)
        if None not in kinds and kinds[0] != kinds[1]:
            self.note(location, f"is {name}, but the path gives {' or '.join(sorted(expr.types or ()))}", "warning")
        return name
