"""Typed expressions: the base class, constants, variables and navigation to elements.

A typed expression knows the FHIR types of its result and emits the Python source that computes it. Its result is
either at most one value (``many`` False: the value or None) or a list. ``emit_for_each`` emits a loop body once,
inside the loops that reach the items, so ``name.given`` becomes two nested loops without a list in between.

A primitive element may have extensions but no value (JSON: ``null`` in an array, or only the property ``_name``). An
item of this kind is called *valueless*: ``count()`` and ``exists()`` include it, but it contributes no value.
"""

from collections.abc import Callable
from dataclasses import dataclass

from typing_extensions import override

from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import runtime
from fhir_assets.fhir.path.emitter import EMPTY, Emitter

Types = frozenset[str] | None
"""The FHIR types that a value may have; None if they depend on the resource."""

EmitBody = Callable[[str], None]
"""Emits the body of a loop, given the name of the item."""


class NotCompiled(Exception):
    """Signals that the compiler does not support an expression; fhirpathpy then evaluates it."""


class Expression:
    """A typed expression. Subclasses override ``emit_value`` or ``emit_for_each``.

    The methods ``emit_*`` write statements to the emitter and return the name or the text of the result. ``types``
    and ``many`` describe the result.
    """

    types: Types = None
    many: bool = False

    def emit_value(self, out: Emitter) -> str:
        """Emit the value: None if the result is empty; if ``many``, a list without valueless items."""
        return self.emit_list(out, include_valueless=False)

    def emit_list(self, out: Emitter, *, include_valueless: bool) -> str:
        """Emit a list of all items."""
        items = out.declare("[]")
        self.emit_for_each(out, lambda item: out.line(f"{items}.append({item})"), include_valueless=include_valueless)
        return items

    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        """Emit ``body`` for each item."""
        if self.many:
            item = out.new_name()
            with out.block(f"for {item} in {self.emit_value(out)}:"):
                body(item)
        else:
            value = self.emit_value(out)
            with out.block(f"if {value} is not None:"):
                body(value)

    def emit_single(self, out: Emitter) -> str:
        """Emit the single value or None; the generated code raises FhirPathError if there are several values."""
        value = self.emit_value(out)
        return out.let(f"{out.bind(runtime.only)}({value})") if self.many else value

    def emit_items(self, out: Emitter) -> str:
        """Emit a sequence without valueless items, even if the result is at most one value."""
        value = self.emit_value(out)
        return value if self.many else out.let(f"() if {value} is None else ({value},)")

    def emit_exists(self, out: Emitter) -> str:
        """Emit the condition that the result is not empty."""
        if not self.many:
            return f"({self.emit_value(out)} is not None)"
        exists = out.declare("False")

        def stop(_: str) -> None:
            out.line(f"{exists} = True")
            out.line("break")

        self.emit_for_each(out, stop, include_valueless=True)
        return exists

    def emit_count(self, out: Emitter) -> str:
        """Emit the number of items."""
        if not self.many:
            return out.let(f"1 if {self.emit_exists(out)} else 0")
        counter = out.declare("0")
        self.emit_for_each(out, lambda _: out.line(f"{counter} += 1"), include_valueless=True)
        return counter

    def emit_conditions(self, out: Emitter) -> tuple[str, str]:
        """Emit two conditions: the result is true, the result is false. Both are false if the result is empty."""
        value = self.emit_single(out)
        if self.types == frozenset({"boolean"}):
            return f"({value} is True)", f"({value} is False)"
        if self.types is not None and "boolean" not in self.types:
            return f"({value} is not None)", "False"
        return f"({value} is not None and {value} is not False)", f"({value} is False)"

    def narrow_to_type(self, wanted: str) -> "Expression":
        """Return the expression for the items of a type (``ofType``)."""
        return OfType(self, wanted) if self.types is None else _narrow_known(self, self.types, wanted)

    def underscore_property(self) -> "Expression":
        """Return the expression for the JSON properties ``_name``, which hold ids and extensions of primitives."""
        raise NotCompiled("extensions of a primitive that is not reached by element names")


def _narrow_known(expr: Expression, types: frozenset[str], wanted: str) -> Expression:
    model = r4()
    if all(model.is_a(type_, wanted) for type_ in types):
        return expr
    if any(model.is_a(wanted, type_) or model.is_a(type_, wanted) for type_ in types):
        return OfType(expr, wanted)
    return EmptyCollection(expr.many)


@dataclass
class EmptyCollection(Expression):
    """The empty collection."""

    many: bool = False
    types: Types = frozenset()

    @override
    def emit_value(self, out: Emitter) -> str:
        return "()" if self.many else "None"

    @override
    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        return

    @override
    def emit_exists(self, out: Emitter) -> str:
        return "False"

    @override
    def emit_conditions(self, out: Emitter) -> tuple[str, str]:
        return "False", "False"


@dataclass
class Focus(Expression):
    """One of ``$this``, ``%context``, ``%resource`` and ``%rootResource``.

    ``name`` is the attribute of the emitter that holds its Python name.
    """

    types: Types
    name: str = "focus"

    @override
    def emit_value(self, out: Emitter) -> str:
        return str(getattr(out, self.name))

    @override
    def emit_items(self, out: Emitter) -> str:
        return f"({self.emit_value(out)},)"

    @override
    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        body(self.emit_value(out))

    @override
    def emit_exists(self, out: Emitter) -> str:
        return "True"


@dataclass
class IndexVariable(Expression):
    """``$index``, ``$total`` or ``%rowIndex``; ``name`` is the attribute of the emitter that holds its Python name."""

    name: str
    types: Types = frozenset({"integer"})

    @override
    def emit_value(self, out: Emitter) -> str:
        name: str | None = getattr(out, self.name)
        if name is None:
            raise NotCompiled(f"${self.name} outside a loop")
        return name


@dataclass
class Constant(Expression):
    """A literal, or a constant of a ViewDefinition."""

    constant: object
    types: Types

    @override
    def emit_value(self, out: Emitter) -> str:
        return repr(self.constant) if isinstance(self.constant, str | int) else out.bind(self.constant)

    @override
    def emit_items(self, out: Emitter) -> str:
        return f"({self.emit_value(out)},)"

    @override
    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        body(self.emit_value(out))

    @override
    def emit_exists(self, out: Emitter) -> str:
        return "True"

    @override
    def emit_conditions(self, out: Emitter) -> tuple[str, str]:
        return str(self.constant is not False), str(self.constant is False)


@dataclass(frozen=True)
class Key:
    """A JSON property of an element, with its type; ``many`` is True if JSON holds an array."""

    name: str
    type: str
    many: bool

    @property
    def primitive(self) -> bool:
        """True if the type is primitive."""
        return r4().is_primitive(self.type)


class Navigation(Expression):
    """``base.name`` where the types of the base are known: ``keys`` are the JSON properties of the element."""

    def __init__(self, base: Expression, keys: tuple[Key, ...]) -> None:
        self.base = base
        self.keys = keys
        self.types = frozenset(key.type for key in keys)
        self.is_array = keys[0].many
        self.many = base.many or self.is_array
        self.may_be_valueless = any(key.primitive for key in keys)

    def _parent(self, out: Emitter) -> str:
        parent = self.base.emit_value(out)
        return parent if isinstance(self.base, Focus) else f"({parent} or {EMPTY})"

    def _read(self, out: Emitter, parent: str) -> str:
        """Return the Python text that reads the properties from ``parent``."""
        if len(self.keys) == 1:
            return f"{parent}.get({self.keys[0].name!r})"
        names = out.bind(runtime.name_set(key.name for key in self.keys))
        return f"{out.bind(runtime.get_choice)}({parent}, {names})"

    def _extra(self, out: Emitter, parent: str) -> str:
        """Return the condition that the element has a property ``_name``, with ids or extensions."""
        if len(self.keys) == 1:
            return f"{'_' + self.keys[0].name!r} in {parent}"
        names = out.bind(runtime.name_set(f"_{key.name}" for key in self.keys))
        return f"not {names}.isdisjoint({parent})"

    @override
    def emit_value(self, out: Emitter) -> str:
        if self.many:
            return super().emit_value(out)
        return out.let(self._read(out, self._parent(out)))

    def emit_json_array(self, out: Emitter) -> str | None:
        """Emit the JSON array of the element; None if the items are not the items of a single array of objects."""
        if self.base.many or not self.is_array or self.may_be_valueless:
            return None
        return out.let(self._read(out, self._parent(out)))

    @override
    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        if self.base.many:
            self.base.emit_for_each(out, lambda parent: self._emit_items_of(out, parent, body, include_valueless))
        else:
            self._emit_items_of(out, self._parent(out), body, include_valueless)

    def _emit_items_of(self, out: Emitter, parent: str, body: EmitBody, include_valueless: bool) -> None:
        read = out.let(self._read(out, parent))
        if not self.is_array:
            extra = f" or {self._extra(out, parent)}" if include_valueless and self.may_be_valueless else ""
            with out.block(f"if {read} is not None{extra}:"):
                body(read)
            return
        item = out.new_name()
        if include_valueless and self.may_be_valueless:
            extras = f"{parent}.get({'_' + self.keys[0].name!r})"
            with out.block(f"for {item} in {out.bind(runtime.pad_primitives)}({read}, {extras}):"):
                body(item)
            return
        with out.block(f"for {item} in {read} or ():"):
            if self.may_be_valueless:
                with out.block(f"if {item} is not None:"):
                    body(item)
            else:
                body(item)

    @override
    def emit_exists(self, out: Emitter) -> str:
        if self.base.many:
            return super().emit_exists(out)
        parent = self._parent(out)
        read = out.let(self._read(out, parent))
        present = f"{read}" if self.is_array else f"{read} is not None"
        if self.may_be_valueless:
            return out.let(f"True if {present} else {self._extra(out, parent)}")
        return out.let(f"bool({read})") if self.is_array else f"({present})"

    @override
    def narrow_to_type(self, wanted: str) -> Expression:
        model = r4()
        kept = tuple(key for key in self.keys if model.is_a(key.type, wanted))
        if kept and len(self.keys) > 1:
            return Navigation(self.base, kept)
        return super().narrow_to_type(wanted)

    def with_element(self, element: str) -> Expression:
        """Return the navigation restricted to the types of a choice that have ``element``."""
        kept = tuple(key for key in self.keys if r4().element(key.type, element))
        return Navigation(self.base, kept) if kept else self

    @override
    def underscore_property(self) -> Expression:
        properties = Navigation(self.base, tuple(Key(f"_{key.name}", "Element", key.many) for key in self.keys))
        properties.may_be_valueless = self.is_array  # the array holds null for a primitive without extensions
        return properties


class UntypedMember(Expression):
    """``base.name`` where the type of the base is not known: the property is looked up by name at run time."""

    many = True

    def __init__(self, base: Expression, name: str) -> None:
        self.base = base
        self.name = name

    @override
    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        def inner(parent: str) -> None:
            item = out.new_name()
            with out.block(f"for {item} in {out.bind(runtime.members)}({parent}, {self.name!r}):"):
                body(item)

        self.base.emit_for_each(out, inner)


class OfType(Expression):
    """``base.ofType(wanted)`` where the JSON of an item decides whether it has the type."""

    def __init__(self, base: Expression, wanted: str) -> None:
        model = r4()
        type_ = model.types[wanted]
        if type_.kind == "resource":
            names = frozenset(name for name in model.types if model.is_a(name, wanted))
            self._test: tuple[str, object] = "{resource_in}({item}, {known})", names
        elif type_.kind == "primitive":
            json_types = runtime.JSON_TYPES.get(model.ancestors(wanted)[-2], (str,))
            self._test = "type({item}) in {known}", json_types
        else:
            raise NotCompiled(f"ofType({wanted}) on a base of unknown type")
        self.base = base
        self.many = base.many
        self.types = frozenset({wanted})

    def _condition(self, out: Emitter, item: str) -> str:
        text, known = self._test
        return text.format(item=item, known=out.bind(known), resource_in=out.bind(runtime.resource_in))

    @override
    def emit_value(self, out: Emitter) -> str:
        if self.many:
            return super().emit_value(out)
        value = self.base.emit_value(out)
        return out.let(f"{value} if {self._condition(out, value)} else None")

    @override
    def emit_for_each(self, out: Emitter, body: EmitBody, *, include_valueless: bool = False) -> None:
        def inner(item: str) -> None:
            with out.block(f"if {self._condition(out, item)}:"):
                body(item)

        self.base.emit_for_each(out, inner)
