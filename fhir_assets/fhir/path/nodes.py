"""Typed expressions that collect elements: they know what they give, and write the Python that collects it.

An expression gives at most one value (``many`` False: the value or None) or a list. ``each`` writes a body once for
all items, inside whatever loops it takes: so ``name.given`` is two nested loops, without a list between them.

A *hole* is a node without a value: a primitive that has only extensions, a null in an array. It counts and it
exists, but it gives no value.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import runtime
from fhir_assets.fhir.path.emitter import EMPTY, Emitter

Types = frozenset[str] | None
"""The FHIR types that a value may have; None if they cannot be known before the resource is seen."""

Body = Callable[[str], None]


class NotCompiled(Exception):
    """The expression is FHIRPath, but this compiler leaves it to fhirpathpy."""


class Expr:
    """A typed expression. Subclasses override ``value`` or ``each``."""

    types: Types = None
    many: bool = False

    def value(self, out: Emitter) -> str:
        """The name of the value, None if there is none; of a list without holes if ``many``."""
        return self.collect(out, holes=False)

    def collect(self, out: Emitter, *, holes: bool) -> str:
        """The name of a list of all items."""
        items = out.start("[]")
        self.each(out, lambda item: out.line(f"{items}.append({item})"), holes=holes)
        return items

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        """Write ``body`` for each item."""
        if self.many:
            item = out.fresh()
            with out.block(f"for {item} in {self.value(out)}:"):
                body(item)
        else:
            value = self.value(out)
            with out.block(f"if {value} is not None:"):
                body(value)

    def single(self, out: Emitter) -> str:
        """The name of the one value or None; generated code raises FhirPathError if there are several."""
        value = self.value(out)
        return out.let(f"{out.bind(runtime.only)}({value})") if self.many else value

    def items(self, out: Emitter) -> str:
        """The name of a list without holes, also for what gives at most one value."""
        value = self.value(out)
        return value if self.many else out.let(f"() if {value} is None else ({value},)")

    def exists(self, out: Emitter) -> str:
        """A Python condition: there is an item."""
        if not self.many:
            return f"({self.value(out)} is not None)"
        found = out.start("False")

        def stop(_: str) -> None:
            out.line(f"{found} = True")
            out.line("break")

        self.each(out, stop, holes=True)
        return found

    def count(self, out: Emitter) -> str:
        """The name of the number of items."""
        if not self.many:
            return out.let(f"1 if {self.exists(out)} else 0")
        counter = out.start("0")
        self.each(out, lambda _: out.line(f"{counter} += 1"), holes=True)
        return counter

    def logic(self, out: Emitter) -> tuple[str, str]:
        """Two Python conditions: it is true, it is false. Neither holds where it is empty."""
        value = self.single(out)
        if self.types == frozenset({"boolean"}):
            return f"({value} is True)", f"({value} is False)"
        if self.types is not None and "boolean" not in self.types:
            return f"({value} is not None)", "False"
        return f"({value} is not None and {value} is not False)", f"({value} is False)"

    def narrow(self, wanted: str) -> "Expr":
        """The items of a type (``ofType``)."""
        return OfType(self, wanted) if self.types is None else _narrow_known(self, self.types, wanted)

    def sibling(self) -> "Expr":
        """The ``_name`` objects beside primitive values: their id and extensions."""
        raise NotCompiled("extensions of a primitive found this way")


def _narrow_known(expr: Expr, types: frozenset[str], wanted: str) -> Expr:
    model = r4()
    if all(model.is_a(type_, wanted) for type_ in types):
        return expr
    if any(model.is_a(wanted, type_) or model.is_a(type_, wanted) for type_ in types):
        return OfType(expr, wanted)
    return Nothing(expr.many)


@dataclass
class Nothing(Expr):
    """The empty collection."""

    many: bool = False
    types: Types = frozenset()

    def value(self, out: Emitter) -> str:
        return "()" if self.many else "None"

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        return

    def exists(self, out: Emitter) -> str:
        return "False"

    def logic(self, out: Emitter) -> tuple[str, str]:
        return "False", "False"


@dataclass
class Focus(Expr):
    """``$this``, ``%context``, ``%resource``: a value that generated code holds under a name."""

    types: Types
    name: str = "focus"

    def value(self, out: Emitter) -> str:
        return str(getattr(out, self.name))

    def items(self, out: Emitter) -> str:
        return f"({self.value(out)},)"

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        body(self.value(out))

    def exists(self, out: Emitter) -> str:
        return "True"


@dataclass
class Counter(Expr):
    """``$index``, ``$total``, ``%rowIndex``."""

    name: str
    types: Types = frozenset({"integer"})

    def value(self, out: Emitter) -> str:
        name: str | None = getattr(out, self.name)
        if name is None:
            raise NotCompiled(f"${self.name} outside a loop")
        return name


@dataclass
class Constant(Expr):
    """A literal or a constant of the view."""

    constant: object
    types: Types

    def value(self, out: Emitter) -> str:
        return repr(self.constant) if isinstance(self.constant, str | int) else out.bind(self.constant)

    def items(self, out: Emitter) -> str:
        return f"({self.value(out)},)"

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        body(self.value(out))

    def exists(self, out: Emitter) -> str:
        return "True"

    def logic(self, out: Emitter) -> tuple[str, str]:
        return str(self.constant is not False), str(self.constant is False)


@dataclass(frozen=True)
class Key:
    """A JSON name under which an element is found, its type there, and whether it is an array."""

    name: str
    type: str
    many: bool

    @property
    def primitive(self) -> bool:
        return r4().is_primitive(self.type)


class Navigation(Expr):
    """``base.name``: a choice of JSON names, resolved against the types of the base."""

    def __init__(self, base: Expr, keys: tuple[Key, ...]) -> None:
        self.base = base
        self.keys = keys
        self.types = frozenset(key.type for key in keys)
        self.is_array = keys[0].many
        self.many = base.many or self.is_array
        self.holey = any(key.primitive for key in keys)

    def _parent(self, out: Emitter) -> str:
        parent = self.base.value(out)
        return parent if isinstance(self.base, Focus) else f"({parent} or {EMPTY})"

    def _read(self, out: Emitter, parent: str) -> str:
        """The Python text of what JSON holds under the names."""
        if len(self.keys) == 1:
            return f"{parent}.get({self.keys[0].name!r})"
        names = out.bind(runtime.name_set(key.name for key in self.keys))
        return f"{out.bind(runtime.choice)}({parent}, {names})"

    def _extra(self, out: Emitter, parent: str) -> str:
        """The condition that a primitive without a value has extensions."""
        if len(self.keys) == 1:
            return f"{'_' + self.keys[0].name!r} in {parent}"
        names = out.bind(runtime.name_set(f"_{key.name}" for key in self.keys))
        return f"not {names}.isdisjoint({parent})"

    def value(self, out: Emitter) -> str:
        if self.many:
            return super().value(out)
        return out.let(self._read(out, self._parent(out)))

    def array(self, out: Emitter) -> str | None:
        """The name of the array as it stands in JSON, if its items are just those: no holes, no other arrays."""
        if self.base.many or not self.is_array or self.holey:
            return None
        return out.let(self._read(out, self._parent(out)))

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        if self.base.many:
            self.base.each(out, lambda parent: self._each_in(out, parent, body, holes))
        else:
            self._each_in(out, self._parent(out), body, holes)

    def _each_in(self, out: Emitter, parent: str, body: Body, holes: bool) -> None:
        read = out.let(self._read(out, parent))
        if not self.is_array:
            extra = f" or {self._extra(out, parent)}" if holes and self.holey else ""
            with out.block(f"if {read} is not None{extra}:"):
                body(read)
            return
        item = out.fresh()
        if holes and self.holey:
            extras = f"{parent}.get({'_' + self.keys[0].name!r})"
            with out.block(f"for {item} in {out.bind(runtime.nodes)}({read}, {extras}):"):
                body(item)
            return
        with out.block(f"for {item} in {read} or ():"):
            if self.holey:
                with out.block(f"if {item} is not None:"):
                    body(item)
            else:
                body(item)

    def exists(self, out: Emitter) -> str:
        if self.base.many:
            return super().exists(out)
        parent = self._parent(out)
        read = out.let(self._read(out, parent))
        present = f"{read}" if self.is_array else f"{read} is not None"
        if self.holey:
            return out.let(f"True if {present} else {self._extra(out, parent)}")
        return out.let(f"bool({read})") if self.is_array else f"({present})"

    def narrow(self, wanted: str) -> Expr:
        model = r4()
        kept = tuple(key for key in self.keys if model.is_a(key.type, wanted))
        if kept and len(self.keys) > 1:
            return Navigation(self.base, kept)
        return super().narrow(wanted)

    def having(self, element: str) -> Expr:
        """The same, without the types of a choice that lack ``element``."""
        kept = tuple(key for key in self.keys if r4().element(key.type, element))
        return Navigation(self.base, kept) if kept else self

    def sibling(self) -> Expr:
        beside = Navigation(self.base, tuple(Key(f"_{key.name}", "Element", key.many) for key in self.keys))
        beside.holey = self.is_array
        return beside


class Members(Expr):
    """``base.name`` where the type of the base is not known: found by name in whatever is there."""

    many = True

    def __init__(self, base: Expr, name: str) -> None:
        self.base = base
        self.name = name

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        def inner(parent: str) -> None:
            item = out.fresh()
            with out.block(f"for {item} in {out.bind(runtime.members)}({parent}, {self.name!r}):"):
                body(item)

        self.base.each(out, inner)


class OfType(Expr):
    """The items of a type, told by looking at them."""

    def __init__(self, base: Expr, wanted: str) -> None:
        model = r4()
        type_ = model.types[wanted]
        if type_.kind == "resource":
            names = frozenset(name for name in model.types if model.is_a(name, wanted))
            self._test: tuple[str, object] = "{resource_in}({item}, {known})", names
        elif type_.kind == "primitive":
            json_types = runtime.JSON_TYPES.get(model.ancestors(wanted)[-2], (str,))
            self._test = "type({item}) in {known}", json_types
        else:
            raise NotCompiled(f"telling {wanted} by its look")
        self.base = base
        self.many = base.many
        self.types = frozenset({wanted})

    def _condition(self, out: Emitter, item: str) -> str:
        text, known = self._test
        return text.format(item=item, known=out.bind(known), resource_in=out.bind(runtime.resource_in))

    def value(self, out: Emitter) -> str:
        if self.many:
            return super().value(out)
        value = self.base.value(out)
        return out.let(f"{value} if {self._condition(out, value)} else None")

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        def inner(item: str) -> None:
            with out.block(f"if {self._condition(out, item)}:"):
                body(item)

        self.base.each(out, inner)
