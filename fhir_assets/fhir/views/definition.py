"""The parser of ViewDefinitions: checks a definition and resolves its columns, types and paths.

See https://sql-on-fhir.org/ig/StructureDefinition-ViewDefinition.html.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fhir_assets.catalog import snake_case
from fhir_assets.errors import FhirPathError, ViewError
from fhir_assets.fhir.model import r4, suggest_name
from fhir_assets.fhir.path.boolean_expressions import kind
from fhir_assets.fhir.path.compiler import Fallback, resolve_expression
from fhir_assets.fhir.path.expressions import Constant, EmptyCollection, Expression, IndexVariable, Types
from fhir_assets.fhir.path.resolver import resolve_type_name
from fhir_assets.fhir.references import Bases
from fhir_assets.fhir.views.fingerprint import compute_fingerprint
from fhir_assets.fhir.views.plan import Column, FilledColumn, Iteration, Plan, RepeatPaths, Select

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_NAME_RULE = "must consist of A-Z, a-z, 0-9 and _ and not begin with a digit or _"
_UNTYPED = "string"
_MAX_SELECT_DEPTH = 50
_NUL = "contains the character NUL (U+0000), which no text in Postgres can contain; remove it"
_TOO_DEEP = "is nested too deeply: shorten the expression, use repeat, or split the view"


@dataclass(frozen=True)
class View:
    """A parsed ViewDefinition. A pickled View holds its JSON only and is parsed again when it is unpickled."""

    name: str
    resource_type: str
    url: str | None
    version: str | None
    title: str | None
    description: str | None
    columns: tuple[Column, ...]
    path: Path | None
    fingerprint: str
    """A hash of columns, paths, filters and constants; texts such as descriptions do not change it."""
    definition: dict[str, Any] = field(repr=False, hash=False)
    plan: Plan = field(repr=False, compare=False)
    fallbacks: tuple[str, ...] = ()
    """The paths that fhirpathpy evaluates, which is much slower than compiled code."""
    reference_bases: Bases = None
    """Absolute references have a key if they begin with one of these base URLs; None: always."""

    def __reduce__(self) -> tuple[object, ...]:
        return parse_view, (self.definition, self.path, self.reference_bases)


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a ViewDefinition and its location, such as ``select[0].column[1].path``.

    A ViewDefinition with warnings only is valid.
    """

    location: str
    message: str
    severity: Literal["error", "warning"] = "error"


def parse_view(definition: dict[str, Any], path: Path | None = None, reference_bases: Bases = None) -> View:
    """Parse a ViewDefinition. ``path`` is the file that it comes from; ``reference_bases`` is that of the View.

    Raises ViewError with the file, the location in it and the problem.
    """
    reader = _Reader(definition, path)
    try:
        view = reader.read_view()
    except _Stop:
        view = None
    errors = [problem for problem in reader.problems if problem.severity == "error"]
    if view is None or errors:
        raise ViewError(reader.describe(errors[0]))
    return replace(view, reference_bases=reference_bases)


def check_view(definition: dict[str, Any]) -> list[Problem]:
    """Return all problems of a ViewDefinition, errors and warnings, in the order in which they are found."""
    reader = _Reader(definition, None)
    with suppress(_Stop):
        reader.read_view()
    return reader.problems


class _Stop(Exception):
    """A problem prevents parsing the rest of the definition."""


class _Reader:
    """Parses one definition and collects its problems with their locations."""

    def __init__(self, definition: dict[str, Any], path: Path | None) -> None:
        self.definition = definition
        self.path = path
        self.constants: dict[str, Expression] = {"rowIndex": IndexVariable("row_index")}
        self.fallbacks: list[str] = []
        self.problems: list[Problem] = []
        self.resource = ""

    def describe(self, problem: Problem) -> str:
        name = self.definition.get("name") if isinstance(self.definition, dict) else None
        view = f"view {name}" if isinstance(name, str) else ""
        where = str(self.path) if self.path else view or "the ViewDefinition"
        text = ": ".join(part for part in (where, problem.location, problem.message) if part)
        return f"{text} ({view})" if self.path and view else text

    def fail(self, location: str, message: str) -> _Stop:
        self.problems.append(Problem(location, message))
        return _Stop()

    def add_problem(self, location: str, message: str, severity: Literal["error", "warning"] = "error") -> None:
        """Record a problem that does not prevent parsing the rest of the definition."""
        self.problems.append(Problem(location, message, severity))

    def read_view(self) -> View:
        definition = self.definition
        if not isinstance(definition, dict):
            raise self.fail("", "is not a JSON object")
        self.resource = self.read_text(definition, "resource", "")
        type_ = r4().types.get(self.resource)
        if type_ is None or type_.kind != "resource":
            resources = [name for name, known in r4().types.items() if known.kind == "resource"]
            raise self.fail("resource", f'R4 has no resource "{self.resource}"{suggest_name(self.resource, resources)}')
        name = definition.get("name") or (self.path.stem if self.path else snake_case(self.resource))
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise self.fail("name", _NAME_RULE)
        self.read_constants()
        focus: Types = frozenset({self.resource})
        selects = self.read_selects(definition, "select", "", focus)
        if not selects:
            raise self.fail("select", "is missing: a view needs at least one")
        where = tuple(
            self.read_condition(node, f"where[{n}]", focus)
            for n, node in enumerate(self.read_objects(definition, "where", ""))
        )
        columns = tuple(column for select in selects for column in select.columns)
        self.check_names(columns)
        return View(
            name=name,
            resource_type=self.resource,
            url=self.read_optional_text(definition, "url", ""),
            version=self.read_optional_text(definition, "version", ""),
            title=self.read_optional_text(definition, "title", ""),
            description=self.read_optional_text(definition, "description", ""),
            columns=columns,
            path=self.path,
            fingerprint=compute_fingerprint({**definition, "name": name}),
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
                self.add_problem("select", f'two columns have the name "{column.name}"')
            seen.add(column.name)

    def read_text(self, node: dict[str, Any], key: str, location: str) -> str:
        value = node.get(key)
        at = f"{location}.{key}" if location else key
        if value is None:
            raise self.fail(at, "is missing")
        if not isinstance(value, str) or not value:
            raise self.fail(at, f"must be text, not {type(value).__name__}")
        return value

    def read_optional_text(self, node: dict[str, Any], key: str, location: str) -> str | None:
        """Return a text that Postgres can store, or None if the member is missing."""
        value = node.get(key)
        at = f"{location}.{key}" if location else key
        if value is not None and not isinstance(value, str):
            raise self.fail(at, f"must be text, not {type(value).__name__}")
        if value is not None and "\0" in value:
            raise self.fail(at, _NUL)
        return value

    def read_objects(self, node: dict[str, Any], key: str, location: str) -> list[dict[str, Any]]:
        value = node.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.fail(f"{location}.{key}" if location else key, "must be an array of objects")
        return value

    def read_constants(self) -> None:
        for n, node in enumerate(self.read_objects(self.definition, "constant", "")):
            location = f"constant[{n}]"
            name = self.read_text(node, "name", location)
            values = [key for key in node if key.startswith("value")]
            if not _NAME.fullmatch(name) or len(values) != 1:
                raise self.fail(location, f"must have one value[x] and a name, which {_NAME_RULE}")
            type_ = values[0].removeprefix("value")
            type_ = type_[:1].lower() + type_[1:]
            if not r4().is_primitive(type_) or isinstance(node[values[0]], dict | list | None):
                raise self.fail(f"{location}.{values[0]}", "must be a primitive value: valueString, valueInteger, …")
            if "\0" in str(node[values[0]]):
                raise self.fail(f"{location}.{values[0]}", _NUL)
            self.constants[name] = Constant(node[values[0]], frozenset({type_}))

    def read_expression(self, text: object, location: str, focus: Types) -> Expression:
        if not isinstance(text, str):
            raise self.fail(location, f"must be a FHIRPath expression, not {type(text).__name__}")
        try:
            expression = self.resolve(text, focus)
        except FhirPathError as error:
            self.add_problem(location, str(error))
            return EmptyCollection(many=True, types=None)
        except RecursionError:
            self.add_problem(location, _TOO_DEEP)
            return EmptyCollection(many=True, types=None)
        if isinstance(expression, Fallback):
            self.fallbacks.append(text)
            self.add_problem(location, "is evaluated by fhirpathpy, which is far slower than compiled paths", "warning")
        return expression

    def read_condition(self, node: dict[str, Any], location: str, focus: Types) -> Expression:
        expression = self.read_expression(self.read_text(node, "path", location), f"{location}.path", focus)
        if expression.types is not None and expression.types - {"boolean"}:
            self.add_problem(f"{location}.path", f"must give a boolean, not {' or '.join(sorted(expression.types))}")
        return expression

    def read_selects(self, node: dict[str, Any], key: str, location: str, focus: Types) -> tuple[Select, ...]:
        prefix = f"{location}.{key}" if location else key
        return tuple(
            self.read_select(item, f"{prefix}[{n}]", focus)
            for n, item in enumerate(self.read_objects(node, key, location))
        )

    def read_select(self, node: dict[str, Any], location: str, focus: Types) -> Select:
        if location.count("[") > _MAX_SELECT_DEPTH:
            top = location.partition(".")[0]
            raise self.fail(top, f"has more than {_MAX_SELECT_DEPTH} selects one within another: split the view")
        iterations: list[Iteration] = [key for key in ("forEach", "forEachOrNull", "repeat") if key in node]
        if len(iterations) > 1:
            raise self.fail(location, f"has both {' and '.join(iterations)}: one is allowed")
        iteration = iterations[0] if iterations else None
        over: Expression | RepeatPaths | None = None
        if iteration == "repeat":
            over, focus = self.read_repeat(node["repeat"], f"{location}.repeat", focus)
        elif iteration:
            over = self.read_expression(node[iteration], f"{location}.{iteration}", focus)
            focus = over.types
        filled_columns = tuple(
            self.read_column(item, f"{location}.column[{n}]", focus)
            for n, item in enumerate(self.read_objects(node, "column", location))
        )
        selects = self.read_selects(node, "select", location, focus)
        union = self.read_selects(node, "unionAll", location, focus)
        if not (filled_columns or selects or union):
            raise self.fail(location, "has neither column nor select nor unionAll")
        for n, branch in enumerate(union[1:], start=1):
            expected = [column.name for column in union[0].columns]
            actual = [column.name for column in branch.columns]
            if actual != expected:
                self.add_problem(
                    f"{location}.unionAll[{n}]",
                    f"has the columns {', '.join(actual)}; the first has {', '.join(expected)}",
                )
        return Select(iteration, over, filled_columns, selects, union)

    def read_repeat(self, paths: object, location: str, focus: Types) -> tuple[RepeatPaths, Types]:
        if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
            raise self.fail(location, "must be an array of FHIRPath expressions")
        for n, path in enumerate(paths):
            self.read_expression(path, f"{location}[{n}]", None)
        first = self.resolve_possible(paths, focus)
        types: Types = frozenset().union(*(expression.types or () for expression in first))
        if any(expression.types is None for expression in first):
            types = None
        while True:
            again = self.resolve_possible(paths, types)
            if types is None or any(expression.types is None for expression in again):
                return RepeatPaths(first, self.resolve_possible(paths, None)), None
            wider = types.union(*(expression.types or () for expression in again))
            if wider == types:
                return RepeatPaths(first, again), types
            types = wider

    def resolve_possible(self, paths: Sequence[str], focus: Types) -> tuple[Expression, ...]:
        """Resolve the paths whose elements the types of the focus have; omit the others."""
        resolved: list[Expression] = []
        for path in paths:
            with suppress(FhirPathError):
                expression = self.resolve(path, focus)
                if not isinstance(expression, EmptyCollection):
                    resolved.append(expression)
        return tuple(resolved)

    def resolve(self, text: str, focus: Types) -> Expression:
        return resolve_expression(
            text, focus=focus, root=self.resource, resource=self.resource, constants=self.constants
        )

    def read_column(self, node: dict[str, Any], location: str, focus: Types) -> FilledColumn:
        name = self.read_text(node, "name", location)
        if not _NAME.fullmatch(name):
            raise self.fail(f"{location}.name", f'"{name}" {_NAME_RULE}')
        expression = self.read_expression(self.read_text(node, "path", location), f"{location}.path", focus)
        collection = node.get("collection", False)
        if not isinstance(collection, bool):
            raise self.fail(f"{location}.collection", f"must be true or false, not {type(collection).__name__}")
        column = Column(
            name=name,
            type=self.read_type(node.get("type"), f"{location}.type", expression),
            collection=collection,
            description=self.read_optional_text(node, "description", location),
            tags=self.read_tags(node, location),
        )
        return FilledColumn(column, expression)

    def read_tags(self, node: dict[str, Any], location: str) -> dict[str, str]:
        tags = {}
        for n, tag in enumerate(self.read_objects(node, "tag", location)):
            if {"name", "value"} <= tag.keys():
                at = f"{location}.tag[{n}]"
                tags[self.read_text(tag, "name", at)] = self.read_text(tag, "value", at)
        return tags

    def read_type(self, declared: object, location: str, expression: Expression) -> str:
        """Return the declared type, otherwise the type that is inferred from the path."""
        inferred = next(iter(expression.types)) if expression.types is not None and len(expression.types) == 1 else None
        if declared is None:
            return inferred or _UNTYPED
        if not isinstance(declared, str):
            raise self.fail(location, f"must be a type name, not {type(declared).__name__}")
        try:
            name = resolve_type_name(declared.rpartition("/")[2])
        except FhirPathError as error:
            self.add_problem(location, str(error))
            return _UNTYPED
        kinds = kind(frozenset({name})), kind(expression.types)
        if None not in kinds and kinds[0] != kinds[1]:
            self.add_problem(
                location, f"is {name}, but the path gives {' or '.join(sorted(expression.types or ()))}", "warning"
            )
        return name
