"""Views as one generated Python function: a resource in, the rows of each view out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fhir_assets.errors import FhirPathError, PermanentError
from fhir_assets.fhir.path.emitter import Emitter
from fhir_assets.fhir.path.expressions import Expression
from fhir_assets.fhir.path.runtime import NOT_FHIR
from fhir_assets.fhir.views.definition import Column, Filled, Repeated, Select, View

Row = tuple[object, ...]
Continue = Callable[[Sequence[str]], None]


class RowError(PermanentError):
    """A resource that a view cannot make rows of. The message holds nothing of the resource."""

    def __init__(self, view: str, column: str, message: str) -> None:
        super().__init__(f"view {view}, column {column}: {message}")
        self.view = view
        self.column = column
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        return RowError, (self.view, self.column, self.message)


class CompiledViews:
    """All views of one resource type, made in one pass over a resource.

    ``empty_join`` False makes ``join()`` of nothing null, as the newest revision of SQL on FHIR has it; the
    published suite still expects the empty text. Pickles as its views.
    """

    def __init__(self, views: Sequence[View], *, empty_join: bool = True) -> None:
        if len({view.resource_type for view in views}) > 1:
            raise ValueError("the views are of several resource types")
        self.views = tuple(views)
        self.empty_join = empty_join
        self._rows, self._places = _compile(self.views, empty_join=empty_join)

    def rows(self, resource: dict[str, Any]) -> list[list[Row]]:
        """For each view its rows, with values as JSON has them, in the order of its columns.

        Raises RowError: a column has several values where one is allowed, or the resource is not R4.
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
        """Which column's line of the generated function failed."""
        location = None
        traceback = error.__traceback__
        while traceback:
            if traceback.tb_frame.f_code.co_filename == "<rows>":
                location = self._places[traceback.tb_lineno - 2]
            traceback = traceback.tb_next
        return location if isinstance(location, tuple) else (self.views[0].name, "?")

    def __reduce__(self) -> tuple[object, ...]:
        return functools.partial(CompiledViews, empty_join=self.empty_join), (self.views,)


_DEEP = 6
"""Loops within loops beyond which rows are collected first: Python allows 20."""
_NOT_R4 = "an element is not of the type that FHIR R4 gives it"


def _compile(
    views: Sequence[View], *, empty_join: bool
) -> tuple[Callable[[dict[str, Any]], list[list[Row]]], list[object]]:
    out = Emitter("resource", "resource", "resource")
    out.empty_join = empty_join
    results = [_Writer(out, view).write() for view in views]
    out.origin = None
    out.line(f"return [{', '.join(results)}]")
    function: Callable[..., Any] = out.function("rows", "resource")
    return function, out.line_origins


class _Writer:
    """Writes the statements that make the rows of one view."""

    def __init__(self, out: Emitter, view: View) -> None:
        self.out = out
        self.view = view

    def write(self) -> str:
        """The name of the list of rows."""
        rows = self.out.declare("[]")
        self.filtered(list(self.view.plan.where), rows)
        return rows

    def filtered(self, conditions: list[Expression], rows: str) -> None:
        if conditions:
            self.out.origin = (self.view.name, "where")
            with self.out.block(f"if {self.condition(conditions[0])}:"):
                self.filtered(conditions[1:], rows)
            return
        self.all(self.view.plan.selects, (), self.append_to(rows), last=True)

    def condition(self, expr: Expression) -> str:
        if expr.types is not None:
            return expr.emit_conditions(self.out)[0]
        value = expr.emit_single(self.out)
        self.out.line(f"if {value} is not None and type({value}) is not bool: {self.refuse('where', 'is no boolean')}")
        return f"{value} is True"

    def refuse(self, column: str, message: str) -> str:
        return f"raise {self.out.bind(RowError)}({self.view.name!r}, {column!r}, {message!r})"

    def append_to(self, rows: str) -> Continue:
        return lambda names: self.out.line(f"{rows}.append(({', '.join(names)},))")

    def all(self, selects: Sequence[Select], before: Sequence[str], then: Continue, *, last: bool) -> None:
        """The cross product of the selects; ``last`` says that ``then`` may be written more than once."""
        if not selects:
            then(before)
            return
        rest = selects[1:]
        self.select(
            selects[0],
            lambda names: self.all(rest, (*before, *names), then, last=last),
            last=last and not rest,
        )

    def select(self, select: Select, then: Continue, *, last: bool) -> None:
        if select.iteration is None:
            self.contents(select, then, last=last)
        elif select.iteration == "forEach" and not last and self.out.depth > _DEEP:
            self.merged(lambda each: self.iterate(select, each, last=True), len(select.columns), then, last=last)
        elif select.iteration == "forEachOrNull":
            self.merged(lambda each: self.or_null(select, each), len(select.columns), then, last=last)
        else:
            self.iterate(select, then, last=last)

    def iterate(self, select: Select, then: Continue, *, last: bool, started: str | None = None) -> None:
        out = self.out
        out.origin = (self.view.name, select.columns[0].name)
        index = out.declare("-1")

        def on(item: str) -> None:
            out.line(f"{index} += 1")
            outer = out.focus, out.context, out.row_index

            def after(names: Sequence[str]) -> None:
                inner = out.focus, out.context, out.row_index
                out.focus, out.context, out.row_index = outer
                then(names)
                out.focus, out.context, out.row_index = inner

            with out.iterating(item, index):
                self.contents(select, after, last=last)

        if isinstance(select.over, Repeated):
            self.repeat(select.over, on)
        elif select.over is not None:
            select.over.emit_for_each(out, on)
        if started:
            out.line(f"{started} = {index} >= 0")

    def repeat(self, paths: Repeated, on: Callable[[str], None]) -> None:
        """Depth first, each element before those in it."""
        out = self.out
        found, walk, item = out.declare("[]"), out.new_name(), out.new_name()

        def keep(child: str) -> None:
            out.line(f"{found}.append({child})")
            out.line(f"{walk}({child})")

        with out.block(f"def {walk}({item}):"), out.focused(item):
            for path in paths.again:
                path.emit_for_each(out, keep)
        for path in paths.first:
            path.emit_for_each(out, keep)
        each = out.new_name()
        with out.block(f"for {each} in {found}:"):
            on(each)

    def or_null(self, select: Select, then: Continue) -> None:
        started = self.out.new_name()
        self.iterate(select, then, last=True, started=started)
        with self.out.block(f"if not {started}:"):
            then(["0" if index else "None" for index in select.indexes])

    def merged(self, write: Callable[[Continue], None], width: int, then: Continue, *, last: bool) -> None:
        """Rows that come from several places in the code, and go on in one."""
        if last:
            write(then)
            return
        rows = self.out.declare("[]")
        write(self.append_to(rows))
        names = [self.out.new_name() for _ in range(width)]
        with self.out.block(f"for {', '.join(names)}, in {rows}:"):
            then(names)

    def contents(self, select: Select, then: Continue, *, last: bool) -> None:
        own = [self.column(filled) for filled in select.filled]
        if not select.union:
            self.all(select.selects, own, then, last=last)
            return
        width = len(select.union[0].columns)

        def union(before: Sequence[str]) -> None:
            self.merged(
                lambda each: self.branches(select.union, each),
                width,
                lambda names: then((*before, *names)),
                last=last,
            )

        self.all(select.selects, own, union, last=False)

    def branches(self, union: Sequence[Select], then: Continue) -> None:
        for branch in union:
            self.select(branch, then, last=True)

    def column(self, filled: Filled) -> str:
        column, path, out = filled.column, filled.path, self.out
        out.origin = (self.view.name, column.name)
        value = path.emit_value(out)
        if column.collection:
            return out.let(f"list({value})") if path.many else out.let(f"[] if {value} is None else [{value}]")
        return self.one(column, value) if path.many else value

    def one(self, column: Column, values: str) -> str:
        refuse = self.refuse(column.name, "several values where one is allowed; set collection or narrow the path")
        self.out.line(f"if len({values}) > 1: {refuse}")
        return self.out.let(f"{values}[0] if {values} else None")
