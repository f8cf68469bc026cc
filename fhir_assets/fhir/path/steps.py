"""Typed expressions that choose from, map or compute with what others give: filters, subsets, functions."""

from collections.abc import Callable, Sequence
from functools import partial

from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import runtime
from fhir_assets.fhir.path.emitter import Emitter
from fhir_assets.fhir.path.nodes import Body, Constant, Counter, Expr, Focus, Navigation, Types

Template = str | Callable[..., object]
"""What computes a value: a function, or Python text with ``{0}``, ``{1}`` for its operands."""


def apply(out: Emitter, function: Template, values: Sequence[str]) -> str:
    """The Python text of the function of these values."""
    if isinstance(function, str):
        return function.format(*values)
    return f"{out.bind(function)}({', '.join(values)})"


class At(Expr):
    """``base[index]`` and ``first()``; ``last()`` without an index."""

    def __init__(self, base: Expr, index: Expr | None) -> None:
        self.base = base
        self.index = index
        self.types = base.types

    def value(self, out: Emitter) -> str:
        index = self.index.single(out) if self.index else "-1"
        direct = index == "0" or self.index is None
        if not self.base.many:
            value = self.base.value(out)
            return value if direct else out.let(f"{value} if {index} == 0 else None")
        items = self.base.array(out) if isinstance(self.base, Navigation) else None
        items = items or self.base.collect(out, holes=True)
        if direct:
            return out.let(f"{items}[{index}] if {items} else None")
        return out.let(f"{out.bind(runtime.at)}({items}, {index})")

    def narrow(self, wanted: str) -> Expr:
        return super().narrow(wanted) if self.base.many else At(self.base.narrow(wanted), self.index)

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
