"""The code generator of views: compiles the views of a resource type to one function from a resource to rows."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fhir_assets.errors import FhirPathError, PermanentError, ViewError
from fhir_assets.fhir.path.emitter import Emitter
from fhir_assets.fhir.path.expressions import Expression
from fhir_assets.fhir.path.runtime import NOT_FHIR
from fhir_assets.fhir.references import Bases
from fhir_assets.fhir.views.definition import View
from fhir_assets.fhir.views.plan import Column, FilledColumn, RepeatPaths, Select

Row = tuple[object, ...]
"""The values of a row, in the order of the columns."""
Continue = Callable[[Sequence[str]], None]
"""Writes the statements that follow, given the names of the column values."""


class RowError(PermanentError):
    """A view cannot compute rows from a resource. The message contains no data of the resource."""

    def __init__(self, view: str, column: str, message: str) -> None:
        super().__init__(f"view {view}, column {column}: {message}")
        self.view = view
        self.column = column
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        return RowError, (self.view, self.column, self.message)


class CompiledViews:
    """The views of one resource type, compiled to one function that reads a resource once.

    ``empty_join`` determines the result of ``join()`` on an empty collection: True gives the empty string, which the
    published test suite expects; False gives null, as the newest revision of SQL on FHIR requires. A pickled instance
    contains only its views and is compiled again when it is unpickled. Raises ValueError if the views have several
    resource types, and ViewError if a path is nested deeper than Python can compile.
    """

    def __init__(self, views: Sequence[View], *, empty_join: bool = True) -> None:
        if len({view.resource_type for view in views}) > 1:
            raise ValueError("the views are of several resource types")
        self.views = tuple(views)
        self.empty_join = empty_join
        self.reference_bases: Bases = views[0].reference_bases if views else None
        self._rows, self._line_origins = _compile(self.views, self.reference_bases, empty_join=empty_join)

    def rows(self, resource: dict[str, Any]) -> list[list[Row]]:
        """Return the rows of each view. A row is a tuple of JSON values in the order of the columns.

        Raises RowError if a column that is not a collection has several values, or if the resource is not FHIR R4.
        """
        try:
            return self._rows(resource)
        except RowError:
            raise
        except (FhirPathError, *NOT_FHIR) as error:
            view, column = self._location(error)
            message = str(error) if isinstance(error, FhirPathError) else _NOT_R4
            raise RowError(view, column, message) from None

    def _location(self, error: BaseException) -> tuple[str, str]:
        """Return the view and the column whose line in the generated function raised the error."""
        location = None
        traceback = error.__traceback__
        while traceback:
            if traceback.tb_frame.f_code.co_filename == "<rows>":
                location = self._line_origins[traceback.tb_lineno - 2]
            traceback = traceback.tb_next
        return location if isinstance(location, tuple) else (self.views[0].name, "?")

    def __reduce__(self) -> tuple[object, ...]:
        return functools.partial(CompiledViews, empty_join=self.empty_join), (self.views,)


_MAX_LOOP_DEPTH = 6
"""The depth of nested loops beyond which rows are collected in a list first, because Python allows 20 blocks."""
_NOT_R4 = "an element does not have the type that FHIR R4 defines"


def _compile(
    views: Sequence[View], reference_bases: Bases, *, empty_join: bool
) -> tuple[Callable[[dict[str, Any]], list[list[Row]]], list[object]]:
    out = Emitter("resource", "resource", "resource")
    out.empty_join = empty_join
    out.reference_bases = reference_bases
    try:
        results = [_Writer(out, view).write() for view in views]
    except RecursionError:
        raise _build_depth_error(views, out.origin) from None
    out.origin = None
    out.line(f"return [{', '.join(results)}]")
    try:
        function: Callable[..., Any] = out.function("rows", "resource")
    except (SyntaxError, RecursionError, MemoryError) as error:
        line = (getattr(error, "lineno", None) or 0) - 2
        raise _build_depth_error(views, out.line_origins[line] if line >= 0 else None) from None
    return function, out.line_origins


def _build_depth_error(views: Sequence[View], origin: object) -> ViewError:
    """Return the error for a path or a select of ``origin`` that is nested too deeply for Python's compiler."""
    view, column = origin if isinstance(origin, tuple) else (views[0].name, None)
    place = f"view {view}" if column is None else f"view {view}, column {column}"
    return ViewError(
        f"{place}: its path and the selects around it are nested too deeply, in more than about 20 loops or 100 "
        "parentheses; shorten the path, use repeat, or split the view"
    )


def check_nesting(view: View) -> None:
    """Raise ViewError if a view is nested deeper than Python can compile. Compiles only views that may be."""
    if _measure_nesting(view.definition) > _SURELY_COMPILED:
        CompiledViews([view])


_SURELY_COMPILED = 18
"""The number of names, parentheses and signs, one path within another, of which no 20 loops can be made."""

_STEPS = re.compile(r"\w+|[(+-]")
_NO_STEPS = re.compile(r"//[^\n]*|/\*.*?\*/|'(?:[^'\\]|\\.)*'", re.DOTALL)
"""Comments and texts."""


def _measure_nesting(definition: Mapping[str, Any]) -> int:
    """Return the number of names, parentheses and signs in the longest chain of paths, one within another."""
    conditions = definition.get("where", ())
    _, deepest = _measure_product(definition.get("select", ()))
    return max([len(conditions) + deepest, *(_count_steps(node["path"]) for node in conditions)])


def _measure_product(selects: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return how deep what follows some selects is nested, and how deep they are: each is within those before it."""
    opened = deepest = 0
    for select in selects:
        inner, within = _measure_select(select)
        deepest = max(deepest, opened + within)
        opened += inner
    return opened, deepest


def _measure_select(select: Mapping[str, Any]) -> tuple[int, int]:
    paths = [select.get("forEach"), select.get("forEachOrNull"), *select.get("repeat", ())]
    over = max((_count_steps(path) + 1 for path in paths if path), default=0)
    columns = max((_count_steps(column["path"]) for column in select.get("column", ())), default=0)
    opened, within = _measure_product(select.get("select", ()))
    branches = [_measure_select(branch) for branch in select.get("unionAll", ())]
    union = max((inner + 1 for inner, _ in branches), default=0)
    deepest = max([columns, within, *(opened + 1 + depth for _, depth in branches)])
    return over + opened + union, over + deepest


def _count_steps(path: str) -> int:
    return len(_STEPS.findall(_NO_STEPS.sub(" ", path)))


class _Writer:
    """Writes the statements that compute the rows of one view."""

    def __init__(self, out: Emitter, view: View) -> None:
        self.out = out
        self.view = view

    def write(self) -> str:
        """Write all statements and return the name of the list of rows."""
        rows = self.out.declare("[]")
        self.write_filter(list(self.view.plan.where), rows)
        return rows

    def write_filter(self, conditions: list[Expression], rows: str) -> None:
        if conditions:
            self.out.origin = (self.view.name, "where")
            with self.out.block(f"if {self.write_condition(conditions[0])}:"):
                self.write_filter(conditions[1:], rows)
            return
        self.write_product(self.view.plan.selects, (), self.append_to(rows), last=True)

    def write_condition(self, expression: Expression) -> str:
        if expression.types is not None:
            return expression.emit_conditions(self.out)[0]
        value = expression.emit_single(self.out)
        raise_error = self.raise_row_error("where", "is not a boolean")
        self.out.line(f"if {value} is not None and type({value}) is not bool: {raise_error}")
        return f"{value} is True"

    def raise_row_error(self, column: str, message: str) -> str:
        return f"raise {self.out.bind(RowError)}({self.view.name!r}, {column!r}, {message!r})"

    def append_to(self, rows: str) -> Continue:
        return lambda names: self.out.line(f"{rows}.append(({', '.join(names)},))")

    def write_product(self, selects: Sequence[Select], before: Sequence[str], then: Continue, *, last: bool) -> None:
        """Write the cross product of the selects.

        ``then`` writes the statements for each row. ``last`` is True if ``then`` may be called more than once.
        """
        if not selects:
            then(before)
            return
        rest = selects[1:]
        self.write_select(
            selects[0],
            lambda names: self.write_product(rest, (*before, *names), then, last=last),
            last=last and not rest,
        )

    def write_select(self, select: Select, then: Continue, *, last: bool) -> None:
        if select.iteration is None:
            self.write_contents(select, then, last=last)
        elif select.iteration == "forEach" and not last and self.out.depth > _MAX_LOOP_DEPTH:
            self.merge(
                lambda next_: self.write_iteration(select, next_, last=True), len(select.columns), then, last=last
            )
        elif select.iteration == "forEachOrNull":
            self.merge(lambda next_: self.write_iteration_or_null(select, next_), len(select.columns), then, last=last)
        else:
            self.write_iteration(select, then, last=last)

    def write_iteration(self, select: Select, then: Continue, *, last: bool, started: str | None = None) -> None:
        out = self.out
        out.origin = (self.view.name, select.columns[0].name)
        index = out.declare("-1")

        def emit_body(item: str) -> None:
            out.line(f"{index} += 1")
            outer = out.focus, out.context, out.row_index

            def after(names: Sequence[str]) -> None:
                inner = out.focus, out.context, out.row_index
                out.focus, out.context, out.row_index = outer
                then(names)
                out.focus, out.context, out.row_index = inner

            with out.iterating(item, index):
                self.write_contents(select, after, last=last)

        if isinstance(select.over, RepeatPaths):
            self.write_repeat(select.over, emit_body)
        elif select.over is not None:
            select.over.emit_for_each(out, emit_body)
        if started:
            out.line(f"{started} = {index} >= 0")

    def write_repeat(self, paths: RepeatPaths, emit_body: Callable[[str], None]) -> None:
        """Write the traversal of ``repeat``: depth first, each element before its descendants."""
        out = self.out
        elements, walk, item = out.declare("[]"), out.new_name(), out.new_name()

        def keep(child: str) -> None:
            out.line(f"{elements}.append({child})")
            out.line(f"{walk}({child})")

        with out.block(f"def {walk}({item}):"), out.focused(item):
            for path in paths.again:
                path.emit_for_each(out, keep)
        for path in paths.first:
            path.emit_for_each(out, keep)
        element = out.new_name()
        with out.block(f"for {element} in {elements}:"):
            emit_body(element)

    def write_iteration_or_null(self, select: Select, then: Continue) -> None:
        started = self.out.new_name()
        self.write_iteration(select, then, last=True, started=started)
        with self.out.block(f"if not {started}:"):
            then(["0" if index else "None" for index in select.indexes])

    def merge(self, write: Callable[[Continue], None], width: int, then: Continue, *, last: bool) -> None:
        """Collect the rows of ``write`` in a list and loop over it, so that the code of ``then`` is written once."""
        if last:
            write(then)
            return
        rows = self.out.declare("[]")
        write(self.append_to(rows))
        names = [self.out.new_name() for _ in range(width)]
        with self.out.block(f"for {', '.join(names)}, in {rows}:"):
            then(names)

    def write_contents(self, select: Select, then: Continue, *, last: bool) -> None:
        own = [self.write_column(filled) for filled in select.filled_columns]
        if not select.union:
            self.write_product(select.selects, own, then, last=last)
            return
        width = len(select.union[0].columns)

        def union(before: Sequence[str]) -> None:
            self.merge(
                lambda next_: self.write_branches(select.union, next_),
                width,
                lambda names: then((*before, *names)),
                last=last,
            )

        self.write_product(select.selects, own, union, last=False)

    def write_branches(self, union: Sequence[Select], then: Continue) -> None:
        for branch in union:
            self.write_select(branch, then, last=True)

    def write_column(self, filled: FilledColumn) -> str:
        column, path, out = filled.column, filled.path, self.out
        out.origin = (self.view.name, column.name)
        value = path.emit_value(out)
        if column.collection:
            return out.let(f"list({value})") if path.many else out.let(f"[] if {value} is None else [{value}]")
        return self.write_single(column, value) if path.many else value

    def write_single(self, column: Column, values: str) -> str:
        raise_error = self.raise_row_error(
            column.name, "several values where one is allowed; set collection or narrow the path"
        )
        self.out.line(f"if len({values}) > 1: {raise_error}")
        return self.out.let(f"{values}[0] if {values} else None")
