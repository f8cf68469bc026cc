"""Typed expressions that collect elements: they know what they give, and write the Python that collects it.

An expression gives at most one value (``many`` False: the value or None) or a list. ``each`` writes a body once for
all items, inside whatever loops it takes: so ``name.given`` is two nested loops, without a list between them.

A *hole* is a node without a value: a primitive that has only extensions, a null in an array. It counts and it
exists, but it gives no value.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import runtime
from fhir_assets.fhir.path.emitter import EMPTY, Emitter

Types = frozenset[str] | None
"""The FHIR types that a value may have; None if they cannot be known before the resource is seen."""

Body = Callable[[str], None]

Template = str | Callable[..., object]
"""What computes a value: a function, or Python text with ``{0}``, ``{1}`` for its operands."""


def apply(out: Emitter, function: Template, values: Sequence[str]) -> str:
    """The Python text of the function of these values."""
    if isinstance(function, str):
        return function.format(*values)
    return f"{out.bind(function)}({', '.join(values)})"


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
        self.array = keys[0].many
        self.many = base.many or self.array
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

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        if self.base.many:
            self.base.each(out, lambda parent: self._each_in(out, parent, body, holes))
        else:
            self._each_in(out, self._parent(out), body, holes)

    def _each_in(self, out: Emitter, parent: str, body: Body, holes: bool) -> None:
        read = out.let(self._read(out, parent))
        if not self.array:
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
        present = f"{read}" if self.array else f"{read} is not None"
        if self.holey:
            return out.let(f"True if {present} else {self._extra(out, parent)}")
        return out.let(f"bool({read})") if self.array else f"({present})"

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
        beside.holey = self.array
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


class At(Expr):
    """``base[n]``, ``first()``, ``last()`` (n = -1)."""

    def __init__(self, base: Expr, index: Expr) -> None:
        self.base = base
        self.index = index
        self.types = base.types

    def value(self, out: Emitter) -> str:
        index = self.index.single(out)
        if not self.base.many:
            value = self.base.value(out)
            return value if index in ("0", "-1") else out.let(f"{value} if {index} == 0 else None")
        if isinstance(self.base, Navigation) and not self.base.base.many and not self.base.holey:
            items = out.let(self.base._read(out, self.base._parent(out)))
        else:
            items = self.base.collect(out, holes=True)
        if index in ("0", "-1"):
            return out.let(f"{items}[{index}] if {items} else None")
        return out.let(f"{out.bind(runtime.at)}({items}, {index})")

    def narrow(self, wanted: str) -> Expr:
        if isinstance(self.base, Navigation) and not self.base.array and not self.base.many:
            return At(self.base.narrow(wanted), self.index)
        return super().narrow(wanted)

    def sibling(self) -> Expr:
        if isinstance(self.base, Navigation) and not self.base.base.many:
            return At(self.base.sibling(), self.index)
        return super().sibling()


class Slice(Expr):
    """``tail()``, ``skip(n)``, ``take(n)``."""

    many = True

    def __init__(self, base: Expr, text: str, count: Expr) -> None:
        self.base = base
        self.text = text
        self.number = count
        self.types = base.types

    def collect(self, out: Emitter, *, holes: bool) -> str:
        number = self.number.single(out)
        items = out.let(f"{self.base.collect(out, holes=True)}{self.text.format(f'max({number}, 0)')}")
        return items if holes else out.let(f"[v for v in {items} if v is not None]")

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        item = out.fresh()
        with out.block(f"for {item} in {self.collect(out, holes=holes)}:"):
            body(item)


class Where(Expr):
    """``base.where(criteria)``."""

    def __init__(self, base: Expr, criteria: Expr, *, indexed: bool = False) -> None:
        self.base = base
        self.criteria = criteria
        self.indexed = indexed
        self.many = base.many
        self.types = base.types

    def value(self, out: Emitter) -> str:
        if self.many:
            return super().value(out)
        kept = out.start("None")
        self.each(out, lambda item: out.line(f"{kept} = {item}"))
        return kept

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        index = out.start("-1") if self.indexed else None

        def inner(item: str) -> None:
            if index:
                out.line(f"{index} += 1")
            with out.focused(item, index):
                condition = self.criteria.logic(out)[0]
            with out.block(f"if {condition}:"):
                body(item)

        self.base.each(out, inner, holes=holes and not _reads_value(self.base))

    def exists(self, out: Emitter) -> str:
        return super().exists(out) if self.many else f"({self.value(out)} is not None)"


def _reads_value(base: Expr) -> bool:
    """True if the criteria may read ``$this`` as a primitive, which a hole is not."""
    return base.types is None or any(r4().is_primitive(type_) for type_ in base.types)


class Select(Expr):
    """``base.select(projection)``."""

    def __init__(self, base: Expr, projection: Expr, *, indexed: bool = False) -> None:
        self.base = base
        self.projection = projection
        self.indexed = indexed
        self.many = base.many or projection.many
        self.types = projection.types

    def value(self, out: Emitter) -> str:
        if self.many:
            return super().value(out)
        kept = out.start("None")
        self.each(out, lambda item: out.line(f"{kept} = {item}"))
        return kept

    def each(self, out: Emitter, body: Body, *, holes: bool = False) -> None:
        index = out.start("-1") if self.indexed else None

        def inner(item: str) -> None:
            outer = out.focus, out.index

            def on(projected: str) -> None:
                with out.focused(*outer):
                    body(projected)

            if index:
                out.line(f"{index} += 1")
            with out.focused(item, index):
                self.projection.each(out, on)

        self.base.each(out, inner)


class Iif(Expr):
    """``iif(criterion, then, otherwise)``: only the chosen branch runs."""

    def __init__(self, criterion: Expr, then: Expr, otherwise: Expr) -> None:
        self.criterion = criterion
        self.then = then
        self.otherwise = otherwise
        self.many = then.many or otherwise.many
        self.types = None if then.types is None or otherwise.types is None else then.types | otherwise.types

    def value(self, out: Emitter) -> str:
        result = out.start("()" if self.many else "None")
        condition = self.criterion.logic(out)[0]
        for header, branch in ((f"if {condition}:", self.then), ("else:", self.otherwise)):
            with out.block(header):
                out.line(f"{result} = {branch.items(out) if self.many else branch.value(out)}")
        return result


class Applied(Expr):
    """A function of whole collections, as ``distinct()`` and ``|``."""

    def __init__(self, function: Template, *operands: Expr, types: Types, many: bool = True) -> None:
        self.function = function
        self.operands = operands
        self.types = types
        self.many = many

    def value(self, out: Emitter) -> str:
        return out.let(apply(out, self.function, [operand.items(out) for operand in self.operands]))


class Scalar(Expr):
    """A function of single values, empty if one of them is."""

    def __init__(self, function: Template, *operands: Expr, types: Types, many: bool = False) -> None:
        self.function = function
        self.operands = operands
        self.types = types
        self.many = many

    def value(self, out: Emitter) -> str:
        values = [operand.single(out) for operand in self.operands]
        call = apply(out, self.function, values)
        missing = " or ".join(
            f"{value} is None"
            for value, operand in zip(values, self.operands, strict=True)
            if not isinstance(operand, Constant | Focus | Counter)
        )
        empty = "()" if self.many else "None"
        return out.let(f"{empty} if {missing} else {call}" if missing else call)


class Repeat(Expr):
    """``base.repeat(projection)``: breadth first, each item once."""

    many = True

    def __init__(self, base: Expr, projection: Expr) -> None:
        self.base = base
        self.projection = projection
        self.types = projection.types

    def value(self, out: Emitter) -> str:
        found = out.start("[]")
        seen = out.start(f"{out.bind(runtime.Seen)}()")
        queue = out.start(f"list({self.base.items(out)})")
        item = out.fresh()
        with out.block(f"for {item} in {queue}:"):
            with out.focused(item):

                def keep(each: str) -> None:
                    with out.block(f"if {seen}.add({each}):"):
                        out.line(f"{found}.append({each})")
                        out.line(f"{queue}.append({each})")

                self.projection.each(out, keep)
        return found


class Count(Expr):
    """``count()``."""

    types: Types = frozenset({"integer"})

    def __init__(self, base: Expr) -> None:
        self.base = base

    def value(self, out: Emitter) -> str:
        return self.base.count(out)


class Join(Expr):
    """``join(separator)``; of nothing at all it gives ``out.empty_join``."""

    types: Types = frozenset({"string"})

    def __init__(self, base: Expr, separator: Expr) -> None:
        self.base = base
        self.separator = separator

    def value(self, out: Emitter) -> str:
        items = self.base.items(out)
        joined = f"{self.separator.single(out)}.join({items})"
        return out.let(joined if out.empty_join else f"{joined} if {items} else None")


class Descendants(Expr):
    """``descendants()``."""

    many = True

    def __init__(self, base: Expr) -> None:
        self.base = base

    def value(self, out: Emitter) -> str:
        return out.let(f"{out.bind(runtime.descendants)}({self.base.items(out)})")

    def narrow(self, wanted: str) -> Expr:
        types = self.base.types
        if types is None and not isinstance(self.base, Focus):
            return super().narrow(wanted)
        known = next(iter(types)) if types is not None and len(types) == 1 else "Resource"
        return Applied(
            partial(runtime.descendants_of, type_name=known, wanted=wanted), self.base, types=frozenset({wanted})
        )


class Resolved(Expr):
    """``resolve()``."""

    types: Types = None

    def __init__(self, base: Expr) -> None:
        self.base = base
        self.many = True

    def value(self, out: Emitter) -> str:
        return out.let(f"{out.bind(runtime.resolve)}({self.base.items(out)}, {out.resource})")
