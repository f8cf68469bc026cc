"""Expressions that are true, false or empty: three-valued logic as two Python conditions, without a third object."""

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.model import r4
from fhir_assets.fhir.path import equality, moments
from fhir_assets.fhir.path.emitter import Emitter
from fhir_assets.fhir.path.nodes import Constant, Expr, Focus, Navigation, Types

Conditions = tuple[str, str]

_BOOLEAN = frozenset({"boolean"})
INTEGERS = frozenset({"integer", "positiveInt", "unsignedInt"})
_NUMBERS = {*INTEGERS, "decimal"}
_MOMENTS = {"date", "dateTime", "instant"}
_TEXTS = {"string", "uri", "base64Binary", "xhtml", "code", "id", "markdown", "canonical", "oid", "url", "uuid"}


def kind(types: Types) -> str | None:
    """What values of these types compare as: text, number, boolean, moment, time, Quantity; None if that is open."""
    kinds = set()
    for type_ in types or ():
        if type_ in _TEXTS:
            kinds.add("text")
        elif type_ in _NUMBERS:
            kinds.add("number")
        elif type_ in _MOMENTS:
            kinds.add("moment")
        elif type_ in ("boolean", "time"):
            kinds.add(type_)
        elif r4().is_a(type_, "Quantity"):
            kinds.add("Quantity")
        else:
            kinds.add("complex")
    return kinds.pop() if len(kinds) == 1 else None


class Logic(Expr):
    """An expression of type boolean, given by its two conditions."""

    types: Types = _BOOLEAN

    def value(self, out: Emitter) -> str:
        true, false = self.logic(out)
        if false == negated(true):
            return out.let(true)
        return out.let(f"True if {true} else False if {false} else None")


def negated(condition: str) -> str:
    """The opposite of a condition."""
    return f"(not {condition})"


class Exists(Logic):
    """``exists()``; ``empty()`` if not ``wanted``."""

    def __init__(self, base: Expr, *, wanted: bool = True) -> None:
        self.base = base
        self.wanted = wanted

    def logic(self, out: Emitter) -> Conditions:
        found = out.let(self.base.exists(out))
        return (found, negated(found)) if self.wanted else (out.let(f"not {found}"), found)

    def value(self, out: Emitter) -> str:
        return self.logic(out)[0]

    def exists(self, out: Emitter) -> str:
        return "True"


class All(Logic):
    """``base.all(criteria)``: no item for which the criteria are not true."""

    def __init__(self, base: Expr, criteria: Expr) -> None:
        self.base = base
        self.criteria = criteria

    def logic(self, out: Emitter) -> Conditions:
        result = out.start("True")

        def check(item: str) -> None:
            with out.focused(item):
                condition = self.criteria.logic(out)[0]
            with out.block(f"if not {condition}:"):
                out.line(f"{result} = False")

        self.base.each(out, check)
        return result, negated(result)


class Not(Logic):
    """``not()``."""

    def __init__(self, base: Expr) -> None:
        self.base = base

    def logic(self, out: Emitter) -> Conditions:
        true, false = self.base.logic(out)
        return false, true


class And(Logic):
    """``left and right``. The right operand runs only where the left one leaves it open."""

    def __init__(self, left: Expr, right: Expr) -> None:
        self.left = left
        self.right = right

    def logic(self, out: Emitter) -> Conditions:
        true, false = self.left.logic(out)
        true2, false2 = out.guarded(negated(false), lambda: self.right.logic(out), ("False", "False"))
        return f"({true} and {true2})", f"({false} or {false2})"


class Or(Logic):
    """``left or right``."""

    def __init__(self, left: Expr, right: Expr) -> None:
        self.left = left
        self.right = right

    def logic(self, out: Emitter) -> Conditions:
        true, false = self.left.logic(out)
        true2, false2 = out.guarded(negated(true), lambda: self.right.logic(out), ("False", "False"))
        return f"({true} or {true2})", f"({false} and {false2})"


class Xor(Logic):
    """``left xor right``."""

    def __init__(self, left: Expr, right: Expr) -> None:
        self.left = left
        self.right = right

    def logic(self, out: Emitter) -> Conditions:
        true, false = self.left.logic(out)
        true2, false2 = self.right.logic(out)
        return f"({true} and {false2} or {false} and {true2})", f"({true} and {true2} or {false} and {false2})"


class Is(Logic):
    """``base is type``."""

    def __init__(self, base: Expr, wanted: str) -> None:
        self.base = base
        self.narrowed = base.narrow(wanted)

    def logic(self, out: Emitter) -> Conditions:
        true = out.let(self.narrowed.exists(out))
        return true, f"({out.let(self.base.exists(out))} and not {true})"


class HasValue(Logic):
    """``hasValue()``: a single primitive that has a value."""

    def __init__(self, base: Expr) -> None:
        self.base = base

    def logic(self, out: Emitter) -> Conditions:
        if isinstance(self.base, Constant):
            return "True", "False"
        value = self.base.value(out)
        primitive = self.base.types is not None and all(r4().is_primitive(type_) for type_ in self.base.types)
        if self.base.many:
            condition = f"(len({value}) == 1 and type({value}[0]) is not dict)"
        else:
            condition = (
                f"({value} is not None)" if primitive else f"({value} is not None and type({value}) is not dict)"
            )
        return condition, negated(condition)


def _nullable(expr: Expr) -> bool:
    return not isinstance(expr, Constant | Focus)


def _present(*sides: tuple[Expr, str]) -> str:
    return "".join(f"{name} is not None and " for side, name in sides if _nullable(side))


def _exact(expr: Expr) -> bool:
    """True if Python's own comparison of its number with any JSON number is exact."""
    return (expr.types is not None and "decimal" not in expr.types) or isinstance(expr, Navigation)


def _moments(left: str | None, right: str | None) -> bool:
    """True if two texts of these kinds are dates: so says one of them, and the other does not object."""
    return "moment" in (left, right) and {left, right} <= {"moment", None}


class Equality(Logic):
    """``left = right`` and, ``wanted`` False, ``left != right``."""

    def __init__(self, left: Expr, right: Expr, *, wanted: bool = True) -> None:
        self.left = left
        self.right = right
        self.wanted = wanted

    def logic(self, out: Emitter) -> Conditions:
        true, false = self._equal(out)
        return (true, false) if self.wanted else (false, true)

    def _equal(self, out: Emitter) -> Conditions:
        left_kind, right_kind = kind(self.left.types), kind(self.right.types)
        compare = moments.equal if _moments(left_kind, right_kind) else equality.equal
        if self.left.many or self.right.many:
            lists = out.bind(equality.equal_lists)
            result = out.let(f"{lists}({self.left.items(out)}, {self.right.items(out)}, {out.bind(compare)})")
            return f"({result} is True)", f"({result} is False)"
        left, right = (self.left, self.left.value(out)), (self.right, self.right.value(out))
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
    """``left ~ right`` and, ``wanted`` False, ``left !~ right``: never empty."""

    def __init__(self, left: Expr, right: Expr, *, wanted: bool = True) -> None:
        self.left = left
        self.right = right
        self.wanted = wanted

    def logic(self, out: Emitter) -> Conditions:
        call = f"{out.bind(equality.equivalent_lists)}({self.left.items(out)}, {self.right.items(out)})"
        result = out.let(call)
        return (result, negated(result)) if self.wanted else (negated(result), result)


class Order(Logic):
    """``left < right`` and its kin."""

    def __init__(self, operator: str, left: Expr, right: Expr) -> None:
        self.operator = operator
        self.left = left
        self.right = right
        kinds = kind(left.types), kind(right.types)
        if None not in kinds and kinds[0] != kinds[1]:
            raise FhirPathError(f'"{operator}" cannot compare a {kinds[0]} with a {kinds[1]}')
        self.kind = kinds[0] if kinds[0] == kinds[1] else None

    def logic(self, out: Emitter) -> Conditions:
        left, right = (self.left, self.left.single(out)), (self.right, self.right.single(out))
        both = _present(left, right)
        if self.kind == "text" or (self.kind == "number" and _exact(self.left) and _exact(self.right)):
            condition = f"{left[1]} {self.operator} {right[1]}"
            return f"({both}{condition})", f"({both}not {condition})"
        kinds = kind(self.left.types), kind(self.right.types)
        compare = moments.compare if _moments(*kinds) else equality.order
        call = f"{out.bind(compare)}({left[1]}, {right[1]})"
        sign = out.let(f"{call} if {both.removesuffix(' and ')} else None" if both else call)
        condition = f"{sign} {self.operator} 0"
        return f"({sign} is not None and {condition})", f"({sign} is not None and not {condition})"


class Contains(Logic):
    """``item in items``."""

    def __init__(self, item: Expr, items: Expr) -> None:
        self.item = item
        self.items_ = items

    def logic(self, out: Emitter) -> Conditions:
        item = self.item.single(out)
        literal = self.items_.constants() if isinstance(self.items_, Union) else None
        if literal is not None and kind(self.item.types) == "text":
            test = f"{item} in {out.bind(literal)}"
        else:
            test = f"{out.bind(equality.contains)}({self.items_.items(out)}, {item})"
        found = out.let(f"{test} if {item} is not None else None" if _nullable(self.item) else test)
        return f"({found} is True)", f"({found} is False)"


class Union(Expr):
    """``left | right``: each value once."""

    many = True

    def __init__(self, left: Expr, right: Expr) -> None:
        self.left = left
        self.right = right
        self.types = None if left.types is None or right.types is None else left.types | right.types

    def constants(self) -> frozenset[str] | None:
        """The strings it is made of, if it is made of literal strings."""
        found: set[str] = set()
        for side in (self.left, self.right):
            if isinstance(side, Union):
                inner = side.constants()
                if inner is None:
                    return None
                found |= inner
            elif isinstance(side, Constant) and isinstance(side.constant, str):
                found.add(side.constant)
            else:
                return None
        return frozenset(found)

    def value(self, out: Emitter) -> str:
        return out.let(f"{out.bind(equality.distinct)}([*{self.left.items(out)}, *{self.right.items(out)}])")

    def exists(self, out: Emitter) -> str:
        left = out.let(self.left.exists(out))
        return f"({left} or {out.let(self.right.exists(out))})"

    def narrow(self, wanted: str) -> Expr:
        return Union(self.left.narrow(wanted), self.right.narrow(wanted))
