"""Name and type resolution: turns a syntax tree into typed expressions.

Every element, type, function and constant is looked up here, so an unknown name is an error at compile time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.model import r4, suggest_name
from fhir_assets.fhir.path import boolean_expressions as booleans
from fhir_assets.fhir.path import date_times, expressions, scalar_functions, syntax
from fhir_assets.fhir.path import invocation_expressions as invocations
from fhir_assets.fhir.path.expressions import Expression, NotCompiled, Types
from fhir_assets.fhir.path.functions import BOUNDARIES, COLLECTIONS, SAME, SCALARS, VALUES, Function

_URLS = {"ucum": "http://unitsofmeasure.org", "sct": "http://snomed.info/sct", "loinc": "http://loinc.org"}
_ARITHMETIC: dict[str, Callable[..., object]] = {
    "+": scalar_functions.add,
    "-": scalar_functions.subtract,
    "*": scalar_functions.multiply,
    "/": scalar_functions.divide,
    "div": scalar_functions.divide_to_integer,
    "mod": scalar_functions.modulo,
}
_INTEGER: Types = frozenset({"integer"})
_STRING: Types = frozenset({"string"})
_BOOLEAN: Types = frozenset({"boolean"})
_WITH_CRITERIA = ("where", "select", "exists", "all", "repeat", "iif", "trace", "aggregate")
_TYPE_FUNCTIONS = ("ofType", "as", "is", "getReferenceKey")
_NOT_SUPPORTED = ("aggregate", "toQuantity", "convertsToQuantity", "type", "sum", "min", "max", "avg")
"""Functions that fhirpathpy evaluates."""


@dataclass(frozen=True)
class Scope:
    """The names and types that an expression may refer to: focus, resource, constants and functions."""

    this: Expression
    root: str | None
    """The type of the resource or of the element that the expression starts from. A path may begin with its name."""
    resource: Types = None
    constants: Mapping[str, Expression] = field(default_factory=dict)
    hooks: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    """Additional functions of single values that return a boolean or None: ``htmlChecks``, ``memberOf``."""

    def inside(self, base: Expression) -> "Scope":
        """Return the scope of criteria that are evaluated for each item of ``base``."""
        return replace(self, this=expressions.Focus(base.types))


def resolve(tree: syntax.Syntax, scope: Scope) -> Expression:
    """Return the typed expression of a syntax tree.

    Raises FhirPathError if an element, a function, a type or a constant does not exist, and NotCompiled if the
    compiler does not support the expression.
    """
    match tree:
        case syntax.Literal():
            return _literal(tree)
        case syntax.Member():
            return _member(tree, scope)
        case syntax.Call():
            return _call(tree, scope)
        case syntax.Special(name="$this"):
            return scope.this
        case syntax.Special(name=name):
            return expressions.IndexVariable(name[1:])
        case syntax.Constant(name=name):
            return _constant(name, scope)
        case syntax.Index(base=base, index=index):
            return invocations.Indexer(resolve(base, scope), resolve(index, scope))
        case syntax.TypeTest(operator=operator, operand=operand, type=type_):
            return _type_test(operator, resolve(operand, scope), type_)
        case syntax.Sign(operator=operator, operand=operand):
            return _apply_sign(operator, resolve(operand, scope))
        case syntax.Operation(operator=operator, left=left, right=right):
            return _operation(operator, resolve(left, scope), resolve(right, scope))
    raise NotCompiled(type(tree).__name__)


def _member(tree: syntax.Member, scope: Scope) -> Expression:
    if tree.base is not None:
        return navigate(resolve(tree.base, scope), tree.name)
    return scope.this if _is_root_name(tree.name, scope) else navigate(scope.this, tree.name)


def _apply_sign(operator: str, operand: Expression) -> Expression:
    if operator == "+":
        return operand
    if isinstance(operand, expressions.Constant) and isinstance(operand.constant, int):
        return expressions.Constant(-operand.constant, operand.types)
    return invocations.ScalarFunction(scalar_functions.negate, operand, types=operand.types)


def _is_root_name(name: str, scope: Scope) -> bool:
    return (
        name[0].isupper()
        and scope.root is not None
        and (name == scope.root or r4().is_a(scope.root, name))
        and (scope.this.types is None or scope.root in scope.this.types)
    )


def _literal(tree: syntax.Literal) -> Expression:
    if tree.type == "empty":
        return expressions.EmptyCollection()
    if tree.type == "Quantity":
        unit = {"code": tree.unit} if tree.unit else {}
        return expressions.Constant({"value": tree.value, **unit}, frozenset({"Quantity"}))
    return expressions.Constant(tree.value, frozenset({tree.type}))


def _constant(name: str, scope: Scope) -> Expression:
    if name in scope.constants:
        return scope.constants[name]
    if name in _URLS:
        return expressions.Constant(_URLS[name], _STRING)
    if name.startswith("vs-"):
        return expressions.Constant(f"http://hl7.org/fhir/ValueSet/{name[3:]}", _STRING)
    if name.startswith("ext-"):
        return expressions.Constant(f"http://hl7.org/fhir/StructureDefinition/{name[4:]}", _STRING)
    match name:
        case "context":
            return expressions.Focus(frozenset({scope.root}) if scope.root else None, "context")
        case "resource":
            return expressions.Focus(scope.resource, "resource")
        case "rootResource":
            return expressions.Focus(None, "root")
    known = (*scope.constants, *_URLS, "context", "resource", "rootResource")
    raise FhirPathError(f'there is no constant "%{name}"{suggest_name(name, known)}')


def navigate(base: Expression, name: str) -> Expression:
    """Return the expression ``base.name``. Raises FhirPathError if no type of the base has the element."""
    if isinstance(base, expressions.EmptyCollection) or (base.types is not None and not base.types):
        return expressions.EmptyCollection(many=True)
    if base.types is None or base.types & {"Resource", "DomainResource"}:
        return _navigate_untyped(base, name)
    model = r4()
    if name in ("extension", "id") and all(model.is_primitive(type_) for type_ in base.types):
        return navigate(base.underscore_property(), name)
    if isinstance(base, expressions.Navigation) and len(base.keys) > 1:
        base = base.with_element(name)
    by_type = {type_: element for type_ in sorted(base.types or ()) if (element := model.element(type_, name))}
    if not by_type:
        raise FhirPathError(_explain_unknown_element(base.types or frozenset(), name))
    keys = {
        tuple(expressions.Key(json_name, type_, element.many) for json_name, type_ in element.json_names())
        for element in by_type.values()
    }
    return expressions.Navigation(base, keys.pop()) if len(keys) == 1 else expressions.UntypedMember(base, name)


def _explain_unknown_element(types: frozenset[str], name: str) -> str:
    model = r4()
    shown = " or ".join(sorted(types))
    elements = {element for type_ in types if type_ in model.types for element in model.types[type_].elements}
    for type_ in types:
        if type_ in model.types and name in model.types[type_].json:
            element, chosen = model.types[type_].json[name]
            return f'{shown} has no element "{name}"; write {element.name}.ofType({chosen})'
    return f'{shown} has no element "{name}"{suggest_name(name, elements)}'


def _navigate_untyped(base: Expression, name: str) -> Expression:
    """Return the expression for an element of a base of unknown type: any type may have the element."""
    model = r4()
    element = model.element("Resource", name)
    if base.types is not None and element is not None:
        return expressions.Navigation(
            base, tuple(expressions.Key(key, t, element.many) for key, t in element.json_names())
        )
    known = {element for type_ in model.types.values() for element in type_.elements}
    if name not in known and name != "resourceType":
        raise FhirPathError(f'no type has an element "{name}"{suggest_name(name, known)}')
    return expressions.UntypedMember(base, name)


_SYSTEM_TYPES = {"Boolean", "String", "Integer", "Decimal", "Date", "DateTime", "Time"}


def resolve_type_name(written: str) -> str:
    """Return the FHIR type that a type specifier names (``FHIR.Patient``, ``System.String``, ``Patient``).

    Raises FhirPathError if the type does not exist.
    """
    space, _, name = written.rpartition(".")
    if space in ("", "System") and name in _SYSTEM_TYPES:
        return name[0].lower() + name[1:]
    if space in ("", "FHIR", "System") and name in r4().types:
        return name
    raise FhirPathError(f'there is no type "{written}"{suggest_name(name, r4().types)}')


def _type_test(operator: str, operand: Expression, written: str) -> Expression:
    wanted = resolve_type_name(written)
    return booleans.Is(operand, wanted) if operator == "is" else operand.narrow_to_type(wanted)


_OPERATORS: dict[str, Callable[[Expression, Expression], Expression]] = {
    "and": booleans.And,
    "or": booleans.Or,
    "xor": booleans.Xor,
    "implies": lambda left, right: booleans.Or(booleans.Not(left), right),
    "=": booleans.Equality,
    "!=": lambda left, right: booleans.Equality(left, right, wanted=False),
    "~": booleans.Equivalence,
    "!~": lambda left, right: booleans.Equivalence(left, right, wanted=False),
    **{operator: partial(booleans.Order, operator) for operator in ("<", ">", "<=", ">=")},
    "in": booleans.Contains,
    "contains": lambda left, right: booleans.Contains(right, left),
    "|": booleans.Union,
    "&": lambda left, right: invocations.CollectionFunction(
        scalar_functions.concatenate, left, right, types=_STRING, many=False
    ),
}


def _operation(operator: str, left: Expression, right: Expression) -> Expression:
    if build := _OPERATORS.get(operator):
        return build(left, right)
    kinds = {booleans.kind(left.types), booleans.kind(right.types)}
    if kinds & {"date", "time", "Quantity"}:
        raise NotCompiled("arithmetic of dates and quantities")
    types: Types = frozenset({"decimal"})
    if operator == "+" and kinds == {"text"}:
        types = _STRING
    elif operator == "div" or (
        operator != "/" and all(t <= booleans.INTEGERS for t in (left.types, right.types) if t is not None)
    ):
        types = _INTEGER
    return invocations.ScalarFunction(_ARITHMETIC[operator], left, right, types=types)


def _call(call: syntax.Call, scope: Scope) -> Expression:
    name = call.name
    if name not in _KNOWN and name not in scope.hooks:
        raise FhirPathError(f"there is no function {name}(){suggest_name(name, (*_KNOWN, *scope.hooks))}")
    base = scope.this if call.base is None else resolve(call.base, scope)
    if name in scope.hooks:
        hook = Function(scope.hooks[name], _BOOLEAN, 0, 9)
        return _scalar(hook, base, [resolve(argument, scope) for argument in call.arguments])
    if name in _WITH_CRITERIA and (call.arguments or name in ("repeat", "iif")):
        return _with_criteria(call, base, scope)
    if name in ("ofType", "as", "is"):
        _check_arguments(call, 1, 1)
        return _type_test("is" if name == "is" else "as", base, _type_argument(call.arguments[0]))
    if name == "getReferenceKey":
        _check_arguments(call, 0, 1)
        wanted = resolve_type_name(_type_argument(call.arguments[0])) if call.arguments else None
        inner = invocations.ReferenceKey(wanted, expressions.Focus(base.types) if base.many else base)
        return invocations.Select(base, inner) if base.many else inner
    arguments = [resolve(argument, scope) for argument in call.arguments]
    for table, build in ((SCALARS, _scalar), (COLLECTIONS, _collection)):
        if function := table.get(name):
            _check_arguments(call, function.min_arguments, function.max_arguments)
            if function.takes and booleans.kind(base.types) not in (function.takes, None):
                raise FhirPathError(f"{name}() takes a {function.takes}, not a {booleans.kind(base.types)}")
            return build(function, base, arguments)
    if function := VALUES.get(name):
        return invocations.ScalarFunction(function.template, types=function.types)
    if name not in _STRUCTURAL:
        raise NotCompiled(f"{name}()")
    minimum, maximum, build_expression = _STRUCTURAL[name]
    _check_arguments(call, minimum, maximum)
    return build_expression(base, *arguments)


def _check_arguments(call: syntax.Call, minimum: int, maximum: int) -> None:
    if not minimum <= len(call.arguments) <= maximum:
        expected = str(minimum) if minimum == maximum else f"{minimum} to {maximum}"
        raise FhirPathError(f"{call.name}() takes {expected} arguments, not {len(call.arguments)}")


def _type_argument(tree: syntax.Syntax) -> str:
    match tree:
        case syntax.Member(base=None, name=name):
            return name
        case syntax.Member(base=syntax.Member(base=None, name=space), name=name):
            return f"{space}.{name}"
        case syntax.Literal(type="string", value=str(name)):
            return name
    raise FhirPathError("a type is written as its name: Patient, FHIR.Quantity, System.String")


def _result_types(types: Types, base: Expression) -> Types:
    return base.types if types is SAME else types


def _scalar(function: Function, base: Expression, arguments: list[Expression]) -> Expression:
    return invocations.ScalarFunction(
        function.template, base, *arguments, types=_result_types(function.types, base), many=function.many
    )


def _collection(function: Function, base: Expression, arguments: list[Expression]) -> Expression:
    types = _result_types(function.types, base)
    if function.many and function.types is SAME and arguments and types is not None:
        types = None if arguments[0].types is None else types | arguments[0].types
    return invocations.CollectionFunction(function.template, base, *arguments, types=types, many=function.many)


def _with_criteria(call: syntax.Call, base: Expression, scope: Scope) -> Expression:
    _check_arguments(call, 2 if call.name == "iif" else 1, {"iif": 3, "trace": 2, "aggregate": 2}.get(call.name, 1))
    if call.name == "aggregate":
        raise NotCompiled("aggregate()")
    if call.name == "trace":
        return base
    if call.name == "iif":
        inner = replace(scope, this=base)
        criterion, then, *otherwise = (resolve(argument, inner) for argument in call.arguments)
        return invocations.Iif(criterion, then, otherwise[0] if otherwise else expressions.EmptyCollection())
    indexed = any(name == "$index" for name in syntax.find_specials(call.arguments[0]))
    criteria = resolve(call.arguments[0], scope.inside(base))
    match call.name:
        case "where":
            return invocations.Where(base, criteria, indexed=indexed)
        case "select":
            return invocations.Select(base, criteria, indexed=indexed)
        case "exists":
            return booleans.Exists(invocations.Where(base, criteria, indexed=indexed))
        case "all":
            return booleans.All(base, criteria)
    return invocations.Repeat(base, criteria)


def _boundary(base: Expression, *, high: bool) -> Expression:
    """Return ``lowBoundary()`` or ``highBoundary()`` for the type of the base, or for any value if it is unknown."""
    types = base.types
    single = next(iter(types)) if types is not None and len(types) == 1 else None
    function: Callable[..., object] = BOUNDARIES.get(single or "", date_times.boundary)
    result_types = frozenset({"decimal"}) if single == "integer" else types
    return invocations.ScalarFunction(function, base, expressions.Constant(high, _BOOLEAN), types=result_types)


def _extension(base: Expression, url: Expression) -> Expression:
    extensions = navigate(base, "extension")
    element = navigate(expressions.Focus(extensions.types), "url")
    return invocations.Where(extensions, booleans.Equality(element, url))


def _join(base: Expression, separator: Expression | None = None) -> Expression:
    return invocations.Join(base, separator or expressions.Constant("", _STRING))


_STRUCTURAL: dict[str, tuple[int, int, Callable[..., Expression]]] = {
    "exists": (0, 0, booleans.Exists),
    "empty": (0, 0, lambda base: booleans.Exists(base, wanted=False)),
    "not": (0, 0, booleans.Not),
    "count": (0, 0, invocations.Count),
    "hasValue": (0, 0, booleans.HasValue),
    "first": (0, 0, lambda base: invocations.Indexer(base, expressions.Constant(0, _INTEGER))),
    "last": (0, 0, lambda base: invocations.Indexer(base, None)),
    "tail": (0, 0, lambda base: invocations.Slice(base, "[1:]", expressions.Constant(1, _INTEGER))),
    "skip": (1, 1, lambda base, number: invocations.Slice(base, "[{}:]", number)),
    "take": (1, 1, lambda base, number: invocations.Slice(base, "[:{}]", number)),
    "union": (1, 1, booleans.Union),
    "extension": (1, 1, _extension),
    "join": (0, 1, _join),
    "descendants": (0, 0, invocations.Descendants),
    "resolve": (0, 0, invocations.Resolve),
    "lowBoundary": (0, 0, lambda base: _boundary(base, high=False)),
    "highBoundary": (0, 0, lambda base: _boundary(base, high=True)),
}
"""Functions with an expression class of their own: the minimum and maximum number of arguments, and the class."""

_KNOWN = frozenset((*SCALARS, *COLLECTIONS, *VALUES, *_STRUCTURAL, *_WITH_CRITERIA, *_TYPE_FUNCTIONS, *_NOT_SUPPORTED))
"""The names of all functions of FHIRPath and FHIR."""
