"""The Python source that a compiler writes: lines, indentation, names, and values that are computed only once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType

EMPTY = "EMPTY"
"""The name under which generated code knows an empty dict: what a missing element's elements are read from."""


class Emitter:
    """Statements of one generated function.

    Expressions are emitted as statements that leave their value under a name; such a name is never assigned twice,
    so that the same text means the same value and is computed once in a scope (``let``).
    """

    def __init__(self, focus: str, resource: str, root: str) -> None:
        self.lines: list[str] = []
        self.places: list[object] = []
        """For each line, what ``place`` was when it was written."""
        self.place: object = None
        self.namespace: dict[str, object] = {EMPTY: {}}
        self.focus = focus
        self.index: str | None = None
        self.total: str | None = None
        self.context = focus
        self.resource = resource
        self.root = root
        self.row_index = "0"
        self.empty_join = True
        self.depth = 1
        self._scopes: list[dict[str, str]] = [{}]
        self._names = 0
        self._bound: dict[int, str] = {}
        self._kept: list[object] = []

    def line(self, text: str) -> None:
        """One statement at the current depth."""
        self._insert(len(self.lines), self.depth, text)

    def _insert(self, at: int, depth: int, text: str) -> None:
        self.lines.insert(at, "    " * depth + text)
        self.places.insert(at, self.place)

    def fresh(self) -> str:
        """A name that nothing else bears."""
        self._names += 1
        return f"v{self._names}"

    def let(self, text: str) -> str:
        """The name of the value of ``text``, computed here or earlier in an enclosing scope."""
        if text.isidentifier():
            return text
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text]
        name = self.fresh()
        self.line(f"{name} = {text}")
        self._scopes[-1][text] = name
        return name

    def start(self, text: str) -> str:
        """A fresh name for a value that following statements change: a list, a flag, a counter."""
        name = self.fresh()
        self.line(f"{name} = {text}")
        return name

    def bind(self, value: object) -> str:
        """The name under which generated code knows an object."""
        key = id(value)
        if key not in self._bound:
            name = getattr(value, "__name__", "")
            if not name.isidentifier() or name in self.namespace:
                name = f"k{len(self._bound)}"
            self._bound[key] = name
            self._kept.append(value)
            self.namespace[name] = value
        return self._bound[key]

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Statements under ``header`` (``if …:``, ``for …:``)."""
        self.line(header)
        before = len(self.lines)
        self.depth += 1
        self._scopes.append({})
        try:
            yield
        finally:
            if len(self.lines) == before:
                self.line("pass")
            self._scopes.pop()
            self.depth -= 1

    @contextmanager
    def iterating(self, focus: str, row_index: str | None) -> Iterator[None]:
        """Like ``focused``, for a view's ``forEach``: ``%context`` and ``%rowIndex`` move too."""
        before = self.context, self.row_index
        self.context, self.row_index = focus, row_index or self.row_index
        with self.focused(focus):
            yield
        self.context, self.row_index = before

    @contextmanager
    def focused(self, focus: str, index: str | None = None) -> Iterator[None]:
        """``$this`` and ``$index`` are these names for a while."""
        before = self.focus, self.index
        self.focus, self.index = focus, index
        try:
            yield
        finally:
            self.focus, self.index = before

    def guarded(self, guard: str, emit: Callable[[], tuple[str, str]], otherwise: tuple[str, str]) -> tuple[str, str]:
        """A pair of conditions; the statements that lead to them run only if ``guard`` holds, else ``otherwise``."""
        at = len(self.lines)
        self.depth += 1
        self._scopes.append({})
        pair = emit()
        self._scopes.pop()
        self.depth -= 1
        if len(self.lines) == at:
            return pair
        first, second = self.fresh(), self.fresh()
        self._insert(at, self.depth, f"if {guard}:")
        self._insert(len(self.lines), self.depth + 1, f"{first} = {pair[0]}; {second} = {pair[1]}")
        self.line("else:")
        self._insert(len(self.lines), self.depth + 1, f"{first} = {otherwise[0]}; {second} = {otherwise[1]}")
        return first, second

    def function(self, name: str, parameters: str) -> Callable[..., object]:
        """The function whose body the lines are."""
        source = "\n".join([f"def {name}({parameters}):", *(self.lines or ["    pass"])])
        code: CodeType = compile(source, f"<{name}>", "exec")
        namespace = dict(self.namespace)
        exec(code, namespace)
        function = namespace[name]
        assert callable(function)
        function.__source__ = source  # type: ignore[attr-defined]
        return function
