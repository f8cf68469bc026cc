"""Typed expressions for invocations: indexers, filters, projections and functions of other expressions."""

from collections.abc import Callable, Sequence
from functools import partial

from typing_extensions import override

from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import runtime
from fhir_assets.fhir.path.emitter import Emitter
from fhir_assets.fhir.path.expressions import Constant, EmitBody, Expression, Focus, IndexVariable, Navigation, Types

Template = str | Callable[..., object]
"""The emitted form of a function: a Python function to call, or Python text with ``{0}``, ``{1}`` for its operands."""


def apply_template(out: Emitter, function: Template, values: Sequence[str]) -> str:
    """Return the Python text that computes the function of these operands."""
    if isinstance(function, str):
        return function.format(*values)
    return f"{out.bind(function)}({', '.join(values)})"


class Indexer(Expression):
    """``base[index]`` and ``first()``, or ``last()`` if ``index`` is None."""

    def __init__(self, base: Expression, index: Expression | None) -> None:
        self.base = base
        self.index = index
        self.types = base.types

    @override
    def emit_value(self, out: Emitter) -> str:
        index = self.index.emit_single(out) if self.index else "-1"
        direct = index == "0" or self.index is None
        if not self.base.many:
            value = self.base.emit_value(out)
            return value if direct else out.let(f"{value} if {index} == 0 else None")
        items = self.base.emit_json_array(out) if isinstance(self.base, Navigation) else None
        items = items or self.base.emit_list(out, include_valueless=True)
        if direct:
            return out.let(f"{items}[{index}] if {items} else None")
        return out.let(f"{out.bind(runtime.at)}({items}, {index})")

    @override
    def narrow_to_type(self, wanted: str) -> Expression:
        return (
            super().narrow_to_type(wanted) if self.base.many else Indexer(self.base.narrow_to_type(wanted), self.index)
        )

    @override
    def underscore_property(self) -> Expression:
        if isinstance(self.base, Navigation) and not self.base.base.many:
            return Indexer(self.base.underscore_property(), self.index)
        return super().underscore_property()


class Slice(Expression):
    """``tail()``, ``skip(n)``, ``take(n)``."""

    many = True

    def __init__(self, base: Expression, text: str, count: Expression) -> None:
        self.base = base
        self.text = text
        self.number = count
        self.types = base.types

    @override
    def emit_list(self, out: Emitter, *, include_valueless: bool) -> str:
        number = self.number.emit_single(out)
        items = out.let(f"{self.base.emit_list(out, include_valueless=True)}{self.text.format(f'max({number}, 0)')}")
        return items if include_valueless else out.let(f"[v for v in {items} if v is not None]")

    @override
    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        item = out.new_name()
        with out.block(f"for {item} in {self.emit_list(out, include_valueless=include_valueless)}:"):
            body(item)


class Where(Expression):
    """``base.where(criteria)``."""

    def __init__(self, base: Expression, criteria: Expression, *, indexed: bool = False) -> None:
        self.base = base
        self.criteria = criteria
        self.indexed = indexed
        self.many = base.many
        self.types = base.types

    @override
    def emit_value(self, out: Emitter) -> str:
        if self.many:
            return super().emit_value(out)
        kept = out.declare("None")
        self.emit_for_each(out, lambda item: out.line(f"{kept} = {item}"))
        return kept

    @override
    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        index = out.declare("-1") if self.indexed else None

        def inner(item: str) -> None:
            if index:
                out.line(f"{index} += 1")
            with out.focused(item, index):
                condition = self.criteria.emit_conditions(out)[0]
            with out.block(f"if {condition}:"):
                body(item)

        self.base.emit_for_each(out, inner, include_valueless=include_valueless and not _reads_value(self.base))

    @override
    def emit_exists(self, out: Emitter) -> str:
        return super().emit_exists(out) if self.many else f"({self.emit_value(out)} is not None)"


def _reads_value(base: Expression) -> bool:
    """Return True if the criteria may read ``$this`` as a primitive; they then skip valueless items."""
    return base.types is None or any(r4().is_primitive(type_) for type_ in base.types)


class Select(Expression):
    """``base.select(projection)``."""

    def __init__(self, base: Expression, projection: Expression, *, indexed: bool = False) -> None:
        self.base = base
        self.projection = projection
        self.indexed = indexed
        self.many = base.many or projection.many
        self.types = projection.types

    @override
    def emit_value(self, out: Emitter) -> str:
        if self.many:
            return super().emit_value(out)
        kept = out.declare("None")
        self.emit_for_each(out, lambda item: out.line(f"{kept} = {item}"))
        return kept

    @override
    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        index = out.declare("-1") if self.indexed else None

        def inner(item: str) -> None:
            outer = out.focus, out.index

            def emit_body(projected: str) -> None:
                with out.focused(*outer):
                    body(projected)

            if index:
                out.line(f"{index} += 1")
            with out.focused(item, index):
                self.projection.emit_for_each(out, emit_body)

        self.base.emit_for_each(out, inner)


class Iif(Expression):
    """``iif(criterion, then, otherwise)``: only the chosen branch is evaluated."""

    def __init__(self, criterion: Expression, then: Expression, otherwise: Expression) -> None:
        self.criterion = criterion
        self.then = then
        self.otherwise = otherwise
        self.many = then.many or otherwise.many
        self.types = None if then.types is None or otherwise.types is None else then.types | otherwise.types

    @override
    def emit_value(self, out: Emitter) -> str:
        result = out.declare("()" if self.many else "None")
        condition = self.criterion.emit_conditions(out)[0]
        for header, branch in ((f"if {condition}:", self.then), ("else:", self.otherwise)):
            with out.block(header):
                out.line(f"{result} = {branch.emit_items(out) if self.many else branch.emit_value(out)}")
        return result


class CollectionFunction(Expression):
    """A function of collections, such as ``distinct()`` and ``combine()``."""

    def __init__(self, function: Template, *operands: Expression, types: Types, many: bool = True) -> None:
        self.function = function
        self.operands = operands
        self.types = types
        self.many = many

    @override
    def emit_value(self, out: Emitter) -> str:
        return out.let(apply_template(out, self.function, [operand.emit_items(out) for operand in self.operands]))


class ScalarFunction(Expression):
    """A function of single values; its result is empty if an operand is empty."""

    def __init__(self, function: Template, *operands: Expression, types: Types, many: bool = False) -> None:
        self.function = function
        self.operands = operands
        self.types = types
        self.many = many

    @override
    def emit_value(self, out: Emitter) -> str:
        values = [operand.emit_single(out) for operand in self.operands]
        call = apply_template(out, self.function, values)
        missing = " or ".join(
            f"{value} is None"
            for value, operand in zip(values, self.operands, strict=True)
            if not isinstance(operand, Constant | Focus | IndexVariable)
        )
        empty = "()" if self.many else "None"
        return out.let(f"{empty} if {missing} else {call}" if missing else call)


class ReferenceKey(Expression):
    """``base.getReferenceKey(wanted)`` for a single value, with the base URLs of the emitter."""

    types = frozenset({"string"})

    def __init__(self, wanted: str | None, base: Expression) -> None:
        self.wanted = wanted
        self.base = base

    @override
    def emit_value(self, out: Emitter) -> str:
        value = self.base.emit_single(out)
        call = f"{out.bind_reference_key(self.wanted)}({value})"
        return out.let(call if isinstance(self.base, Focus) else f"None if {value} is None else {call}")


class Repeat(Expression):
    """``base.repeat(projection)``: breadth first, each distinct item once."""

    many = True

    def __init__(self, base: Expression, projection: Expression) -> None:
        self.base = base
        self.projection = projection
        self.types = projection.types

    @override
    def emit_value(self, out: Emitter) -> str:
        result = out.declare("[]")
        seen = out.declare(f"{out.bind(runtime.Seen)}()")
        queue = out.declare(f"list({self.base.emit_items(out)})")
        item = out.new_name()
        with out.block(f"for {item} in {queue}:"):
            with out.focused(item):

                def keep(projected: str) -> None:
                    with out.block(f"if {seen}.add({projected}):"):
                        out.line(f"{result}.append({projected})")
                        out.line(f"{queue}.append({projected})")

                self.projection.emit_for_each(out, keep)
        return result


class Count(Expression):
    """``count()``."""

    types: Types = frozenset({"integer"})

    def __init__(self, base: Expression) -> None:
        self.base = base

    @override
    def emit_value(self, out: Emitter) -> str:
        return self.base.emit_count(out)


class Join(Expression):
    """``join(separator)``. The result of an empty collection is the empty string, or empty if not ``empty_join``."""

    types: Types = frozenset({"string"})

    def __init__(self, base: Expression, separator: Expression) -> None:
        self.base = base
        self.separator = separator

    @override
    def emit_value(self, out: Emitter) -> str:
        items = self.base.emit_items(out)
        joined = f"{self.separator.emit_single(out)}.join({items})"
        return out.let(joined if out.empty_join else f"{joined} if {items} else None")


class Descendants(Expression):
    """``descendants()``."""

    many = True

    def __init__(self, base: Expression) -> None:
        self.base = base

    @override
    def emit_value(self, out: Emitter) -> str:
        return out.let(f"{out.bind(runtime.descendants)}({self.base.emit_items(out)})")

    @override
    def narrow_to_type(self, wanted: str) -> Expression:
        types = self.base.types
        if types is None and not isinstance(self.base, Focus):
            return super().narrow_to_type(wanted)
        known = next(iter(types)) if types is not None and len(types) == 1 else "Resource"
        return CollectionFunction(
            partial(runtime.descendants_of, type_name=known, wanted=wanted), self.base, types=frozenset({wanted})
        )


class Resolve(Expression):
    """``resolve()``."""

    types: Types = None

    def __init__(self, base: Expression) -> None:
        self.base = base
        self.many = True

    @override
    def emit_value(self, out: Emitter) -> str:
        return out.let(f"{out.bind(runtime.resolve)}({self.base.emit_items(out)}, {out.resource})")
