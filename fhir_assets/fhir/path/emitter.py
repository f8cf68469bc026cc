"""The emitter of generated Python source: lines, indentation, names, and reuse of values already computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType

from fhir_assets.fhir.path.runtime import build_reference_key
from fhir_assets.fhir.references import Bases

EMPTY = "EMPTY"
"""The name of an empty dict in generated code. Elements of a missing element are read from it."""


class Emitter:
    """The statements of one generated function.

    An expression is emitted as statements that assign its value to a name. A name assigned by ``let`` is never
    assigned again, so equal text means an equal value and is computed once in a scope.

    ``focus``, ``index``, ``total``, ``context``, ``resource``, ``root`` and ``row_index`` are the Python names of
    ``$this``, ``$index``, ``$total``, ``%context``, ``%resource``, ``%rootResource`` and ``%rowIndex`` at this point of
    the function.
    """

    def __init__(self, focus: str, resource: str, root: str) -> None:
        self.lines: list[str] = []
        self.line_origins: list[object] = []
        """The value of ``origin`` at the time each line was written, used to attribute errors to their origin."""
        self.origin: object = None
        self.namespace: dict[str, object] = {EMPTY: {}}
        self.focus = focus
        self.index: str | None = None
        self.total: str | None = None
        self.context = focus
        self.resource = resource
        self.root = root
        self.row_index = "0"
        self.empty_join = True
        self.reference_bases: Bases = None
        self._reference_keys: dict[str | None, str] = {}
        self.depth = 1
        self._scopes: list[dict[str, str]] = [{}]
        self._names = 0
        self._bound: dict[int, str] = {}
        self._kept: list[object] = []

    def line(self, text: str) -> None:
        """Append one statement at the current indentation."""
        self._insert(len(self.lines), self.depth, text)

    def _insert(self, at: int, depth: int, text: str) -> None:
        self.lines.insert(at, "    " * depth + text)
        self.line_origins.insert(at, self.origin)

    def new_name(self) -> str:
        """Return a name that is not used yet."""
        self._names += 1
        return f"v{self._names}"

    def let(self, text: str) -> str:
        """Return a name that holds the value of ``text``, assigned here or earlier in an enclosing scope."""
        if text.isidentifier():
            return text
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text]
        name = self.new_name()
        self.line(f"{name} = {text}")
        self._scopes[-1][text] = name
        return name

    def declare(self, text: str) -> str:
        """Assign ``text`` to a new name that later statements may change: a list, a flag, a counter."""
        name = self.new_name()
        self.line(f"{name} = {text}")
        return name

    def bind(self, value: object) -> str:
        """Return the name of an object in the namespace of the generated code."""
        key = id(value)
        if key not in self._bound:
            name = getattr(value, "__name__", "")
            if not name.isidentifier() or name in self.namespace:
                name = f"k{len(self._bound)}"
            self._bound[key] = name
            self._kept.append(value)
            self.namespace[name] = value
        return self._bound[key]

    def bind_reference_key(self, wanted: str | None) -> str:
        """Return the name of the function ``getReferenceKey(wanted)``, which is bound once for each type."""
        if wanted not in self._reference_keys:
            self._reference_keys[wanted] = self.bind(build_reference_key(wanted, self.reference_bases))
        return self._reference_keys[wanted]

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Indent the statements written inside under ``header`` (``if …:``, ``for …:``)."""
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
        """Bind ``$this``, ``%context`` and ``%rowIndex`` for the ``forEach`` of a view inside the ``with`` block."""
        before = self.context, self.row_index
        self.context, self.row_index = focus, row_index or self.row_index
        with self.focused(focus):
            yield
        self.context, self.row_index = before

    @contextmanager
    def focused(self, focus: str, index: str | None = None) -> Iterator[None]:
        """Bind ``$this`` and ``$index`` to these names inside the ``with`` block."""
        before = self.focus, self.index
        self.focus, self.index = focus, index
        try:
            yield
        finally:
            self.focus, self.index = before

    def guarded(self, guard: str, emit: Callable[[], tuple[str, str]], otherwise: tuple[str, str]) -> tuple[str, str]:
        """Emit a pair of conditions whose statements run only if ``guard`` is true.

        Returns the names of the two conditions; they have the values ``otherwise`` where ``guard`` is false.
        """
        at = len(self.lines)
        self.depth += 1
        self._scopes.append({})
        pair = emit()
        self._scopes.pop()
        self.depth -= 1
        if len(self.lines) == at:
            return pair
        first, second = self.new_name(), self.new_name()
        self._insert(at, self.depth, f"if {guard}:")
        self._insert(len(self.lines), self.depth + 1, f"{first} = {pair[0]}; {second} = {pair[1]}")
        self.line("else:")
        self._insert(len(self.lines), self.depth + 1, f"{first} = {otherwise[0]}; {second} = {otherwise[1]}")
        return first, second

    def function(self, name: str, parameters: str) -> Callable[..., object]:
        """Compile the lines to a function. Its source is its attribute ``__source__``."""
        source = "\n".join([f"def {name}({parameters}):", *(self.lines or ["    pass"])])
        code: CodeType = compile(source, f"<{name}>", "exec")
        namespace = dict(self.namespace)
        exec(code, namespace)
        function = namespace[name]
        assert callable(function)
        function.__source__ = source  # type: ignore[attr-defined]
        return function
