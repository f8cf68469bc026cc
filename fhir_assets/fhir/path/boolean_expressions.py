"""Typed expressions with a boolean result: existence, logic, equality, order and membership.

The result has three values: true, false or empty. It is emitted as two Python conditions, *is true* and *is false*;
both are false if the result is empty. The module also holds ``Union``, which membership tests use.
"""

from typing_extensions import override

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import date_times, equality
from fhir_assets.fhir.path.emitter import Emitter
from fhir_assets.fhir.path.expressions import Constant, Expression, Focus, Navigation, Types

Conditions = tuple[str, str]

_BOOLEAN = frozenset({"boolean"})
INTEGERS = frozenset({"integer", "positiveInt", "unsignedInt"})
_NUMBERS = {*INTEGERS, "decimal"}
_DATES = {"date", "dateTime", "instant"}
_TEXTS = {"string", "uri", "base64Binary", "xhtml", "code", "id", "markdown", "canonical", "oid", "url", "uuid"}


def kind(types: Types) -> str | None:
    """Return the kind by which values of these types are compared, or None if it depends on the resource.

    The kinds are ``text``, ``number``, ``boolean``, ``date``, ``time``, ``Quantity`` and ``complex``.
    """
    kinds = set()
    for type_ in types or ():
        if type_ in _TEXTS:
            kinds.add("text")
        elif type_ in _NUMBERS:
            kinds.add("number")
        elif type_ in _DATES:
            kinds.add("date")
        elif type_ in ("boolean", "time"):
            kinds.add(type_)
        elif r4().is_a(type_, "Quantity"):
            kinds.add("Quantity")
        else:
            kinds.add("complex")
    return kinds.pop() if len(kinds) == 1 else None


class Logic(Expression):
    """The base of boolean expressions. Subclasses override ``emit_conditions``."""

    types: Types = _BOOLEAN

    @override
    def emit_value(self, out: Emitter) -> str:
        true, false = self.emit_conditions(out)
        if false == negate(true):
            return out.let(true)
        return out.let(f"True if {true} else False if {false} else None")


def negate(condition: str) -> str:
    """Return the negation of a Python condition."""
    return f"(not {condition})"


class Exists(Logic):
    """``exists()``, or ``empty()`` if ``wanted`` is False."""

    def __init__(self, base: Expression, *, wanted: bool = True) -> None:
        self.base = base
        self.wanted = wanted

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        exists = out.let(self.base.emit_exists(out))
        return (exists, negate(exists)) if self.wanted else (out.let(f"not {exists}"), exists)

    @override
    def emit_value(self, out: Emitter) -> str:
        return self.emit_conditions(out)[0]

    @override
    def emit_exists(self, out: Emitter) -> str:
        return "True"


class All(Logic):
    """``base.all(criteria)``: true if the criteria are true for every item."""

    def __init__(self, base: Expression, criteria: Expression) -> None:
        self.base = base
        self.criteria = criteria

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        result = out.declare("True")

        def check(item: str) -> None:
            with out.focused(item):
                condition = self.criteria.emit_conditions(out)[0]
            with out.block(f"if not {condition}:"):
                out.line(f"{result} = False")

        self.base.emit_for_each(out, check)
        return result, negate(result)


class Not(Logic):
    """``not()``."""

    def __init__(self, base: Expression) -> None:
        self.base = base

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        true, false = self.base.emit_conditions(out)
        return false, true


class And(Logic):
    """``left and right``. The right operand is evaluated only if the left one is not false."""

    def __init__(self, left: Expression, right: Expression) -> None:
        self.left = left
        self.right = right

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        true, false = self.left.emit_conditions(out)
        true2, false2 = out.guarded(negate(false), lambda: self.right.emit_conditions(out), ("False", "False"))
        return f"({true} and {true2})", f"({false} or {false2})"


class Or(Logic):
    """``left or right``. The right operand is evaluated only if the left one is not true."""

    def __init__(self, left: Expression, right: Expression) -> None:
        self.left = left
        self.right = right

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        true, false = self.left.emit_conditions(out)
        true2, false2 = out.guarded(negate(true), lambda: self.right.emit_conditions(out), ("False", "False"))
        return f"({true} or {true2})", f"({false} and {false2})"


class Xor(Logic):
    """``left xor right``."""

    def __init__(self, left: Expression, right: Expression) -> None:
        self.left = left
        self.right = right

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        true, false = self.left.emit_conditions(out)
        true2, false2 = self.right.emit_conditions(out)
        return f"({true} and {false2} or {false} and {true2})", f"({true} and {true2} or {false} and {false2})"


class Is(Logic):
    """``base is type``."""

    def __init__(self, base: Expression, wanted: str) -> None:
        self.base = base
        self.narrowed = base.narrow_to_type(wanted)

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        true = out.let(self.narrowed.emit_exists(out))
        return true, f"({out.let(self.base.emit_exists(out))} and not {true})"


class HasValue(Logic):
    """``hasValue()``: true for a single primitive that has a value."""

    def __init__(self, base: Expression) -> None:
        self.base = base

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        if isinstance(self.base, Constant):
            return "True", "False"
        value = self.base.emit_value(out)
        primitive = self.base.types is not None and all(r4().is_primitive(type_) for type_ in self.base.types)
        if self.base.many:
            condition = f"(len({value}) == 1 and type({value}[0]) is not dict)"
        else:
            condition = (
                f"({value} is not None)" if primitive else f"({value} is not None and type({value}) is not dict)"
            )
        return condition, negate(condition)


def _nullable(expr: Expression) -> bool:
    return not isinstance(expr, Constant | Focus)


def _present(*sides: tuple[Expression, str]) -> str:
    return "".join(f"{name} is not None and " for side, name in sides if _nullable(side))


def _exact(expr: Expression) -> bool:
    """Return True if Python compares the number exactly with any JSON number."""
    return (expr.types is not None and "decimal" not in expr.types) or isinstance(expr, Navigation)


def _are_dates(left: str | None, right: str | None) -> bool:
    """Return True if one of the kinds is a date and the other is a date or unknown."""
    return "date" in (left, right) and {left, right} <= {"date", None}


class Equality(Logic):
    """``left = right``, or ``left != right`` if ``wanted`` is False."""

    def __init__(self, left: Expression, right: Expression, *, wanted: bool = True) -> None:
        self.left = left
        self.right = right
        self.wanted = wanted

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        true, false = self._equal(out)
        return (true, false) if self.wanted else (false, true)

    def _equal(self, out: Emitter) -> Conditions:
        left_kind, right_kind = kind(self.left.types), kind(self.right.types)
        compare = date_times.equal if _are_dates(left_kind, right_kind) else equality.equal
        if self.left.many or self.right.many:
            lists = out.bind(equality.equal_lists)
            result = out.let(f"{lists}({self.left.emit_items(out)}, {self.right.emit_items(out)}, {out.bind(compare)})")
            return f"({result} is True)", f"({result} is False)"
        left, right = (self.left, self.left.emit_value(out)), (self.right, self.right.emit_value(out))
        plain = left_kind == right_kind and (
            left_kind in ("text", "boolean") or (left_kind == "number" and _exact(self.left) and _exact(self.right))
        )
        if plain:
            both = _present(left, right)
            guard = "" if not _nullable(self.left) or not _nullable(self.right) else f"{left[1]} is not None and "
            return f"({guard}{left[1]} == {right[1]})", f"({both}{left[1]} != {right[1]})"
        both = _present(left, right)
        call = f"{out.bind(compare)}({left[1]}, {right[1]})"
        result = out.let(f"{call} if {both.removesuffix(' and ')} else None" if both else call)
        return f"({result} is True)", f"({result} is False)"


class Equivalence(Logic):
    """``left ~ right``, or ``left !~ right`` if ``wanted`` is False. The result is never empty."""

    def __init__(self, left: Expression, right: Expression, *, wanted: bool = True) -> None:
        self.left = left
        self.right = right
        self.wanted = wanted

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        call = f"{out.bind(equality.equivalent_lists)}({self.left.emit_items(out)}, {self.right.emit_items(out)})"
        result = out.let(call)
        return (result, negate(result)) if self.wanted else (negate(result), result)


class Order(Logic):
    """``left operator right`` for ``<``, ``<=``, ``>`` and ``>=``."""

    def __init__(self, operator: str, left: Expression, right: Expression) -> None:
        self.operator = operator
        self.left = left
        self.right = right
        kinds = kind(left.types), kind(right.types)
        if None not in kinds and kinds[0] != kinds[1]:
            raise FhirPathError(f'"{operator}" cannot compare a {kinds[0]} with a {kinds[1]}')
        self.kind = kinds[0] if kinds[0] == kinds[1] else None

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        left, right = (self.left, self.left.emit_single(out)), (self.right, self.right.emit_single(out))
        both = _present(left, right)
        if self.kind == "text" or (self.kind == "number" and _exact(self.left) and _exact(self.right)):
            condition = f"{left[1]} {self.operator} {right[1]}"
            return f"({both}{condition})", f"({both}not {condition})"
        kinds = kind(self.left.types), kind(self.right.types)
        compare = date_times.compare if _are_dates(*kinds) else equality.order
        call = f"{out.bind(compare)}({left[1]}, {right[1]})"
        sign = out.let(f"{call} if {both.removesuffix(' and ')} else None" if both else call)
        condition = f"{sign} {self.operator} 0"
        return f"({sign} is not None and {condition})", f"({sign} is not None and not {condition})"


class Contains(Logic):
    """``item in items``, also written ``items contains item``."""

    def __init__(self, item: Expression, items: Expression) -> None:
        self.item = item
        self.collection = items

    @override
    def emit_conditions(self, out: Emitter) -> Conditions:
        item = self.item.emit_single(out)
        literal = self.collection.constants() if isinstance(self.collection, Union) else None
        if literal is not None and kind(self.item.types) == "text":
            test = f"{item} in {out.bind(literal)}"
        else:
            test = f"{out.bind(equality.contains)}({self.collection.emit_items(out)}, {item})"
        result = out.let(f"{test} if {item} is not None else None" if _nullable(self.item) else test)
        return f"({result} is True)", f"({result} is False)"


class Union(Expression):
    """``left | right``: each distinct value once."""

    many = True

    def __init__(self, left: Expression, right: Expression) -> None:
        self.left = left
        self.right = right
        self.types = None if left.types is None or right.types is None else left.types | right.types

    def constants(self) -> frozenset[str] | None:
        """Return the strings of a union of string literals, None for any other union."""
        strings: set[str] = set()
        for side in (self.left, self.right):
            if isinstance(side, Union):
                inner = side.constants()
                if inner is None:
                    return None
                strings |= inner
            elif isinstance(side, Constant) and isinstance(side.constant, str):
                strings.add(side.constant)
            else:
                return None
        return frozenset(strings)

    @override
    def emit_value(self, out: Emitter) -> str:
        return out.let(f"{out.bind(equality.distinct)}([*{self.left.emit_items(out)}, *{self.right.emit_items(out)}])")

    @override
    def emit_exists(self, out: Emitter) -> str:
        left = out.let(self.left.emit_exists(out))
        return f"({left} or {out.let(self.right.emit_exists(out))})"

    @override
    def narrow_to_type(self, wanted: str) -> Expression:
        return Union(self.left.narrow_to_type(wanted), self.right.narrow_to_type(wanted))
