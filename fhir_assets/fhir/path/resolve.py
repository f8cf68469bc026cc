"""Syntax to typed expressions: each name is looked up in the R4 model, so a misspelt element is found here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.model import r4, suggest_name
from fhir_assets.fhir.path import logic, moments, nodes, runtime, scalars, steps, syntax
from fhir_assets.fhir.path.functions import BOUNDARIES, COLLECTIONS, SAME, SCALARS, VALUES, Function
from fhir_assets.fhir.path.nodes import Expr, NotCompiled, Types

_URLS = {"ucum": "http://unitsofmeasure.org", "sct": "http://snomed.info/sct", "loinc": "http://loinc.org"}
_ARITHMETIC: dict[str, Callable[..., object]] = {
    "+": scalars.add,
    "-": scalars.subtract,
    "*": scalars.multiply,
    "/": scalars.divide,
    "div": scalars.whole_divide,
    "mod": scalars.modulo,
}
_INTEGER: Types = frozenset({"integer"})
_STRING: Types = frozenset({"string"})
_BOOLEAN: Types = frozenset({"boolean"})
_WITH_CRITERIA = ("where", "select", "exists", "all", "repeat", "iif", "trace", "aggregate")
_OTHERS = (
    *_WITH_CRITERIA,
    *("empty", "not", "count", "hasValue", "first", "last", "tail", "skip", "take", "ofType", "as", "is", "union"),
    *("extension", "join", "descendants", "resolve", "getReferenceKey", "lowBoundary", "highBoundary"),
)
_LEFT_TO_FHIRPATHPY = ("aggregate", "toQuantity", "convertsToQuantity", "type", "sum", "min", "max", "avg")
_KNOWN = frozenset((*SCALARS, *COLLECTIONS, *VALUES, *_OTHERS, *_LEFT_TO_FHIRPATHPY))


@dataclass(frozen=True)
class Scope:
    """Where an expression stands: its focus, what ``%resource`` is, which constants and functions there are."""

    this: Expr
    root: str | None
    """The type of the resource, or of the element for an invariant: a path may begin with its name."""
    resource: Types = None
    constants: Mapping[str, Expr] = field(default_factory=dict)
    hooks: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    """Functions that the caller brings, of single values, giving a boolean or None: ``htmlChecks``, ``memberOf``."""

    def inside(self, base: Expr) -> "Scope":
        """The scope of criteria that are evaluated for each item of ``base``."""
        return replace(self, this=nodes.Focus(base.types))


def resolve(tree: syntax.Syntax, scope: Scope) -> Expr:
    """The typed expression of a syntax tree.

    Raises FhirPathError if an element, a function, a type or a constant is not known, and NotCompiled for what is
    left to fhirpathpy.
    """
    match tree:
        case syntax.Literal():
            return _literal(tree)
        case syntax.Member(base=None, name=name) if _is_root_name(name, scope):
            return scope.this
        case syntax.Member(base=base, name=name):
            return navigate(scope.this if base is None else resolve(base, scope), name)
        case syntax.Call():
            return _call(tree, scope)
        case syntax.Special(name="$this"):
            return scope.this
        case syntax.Special(name=name):
            return nodes.Counter(name[1:])
        case syntax.Constant(name=name):
            return _constant(name, scope)
        case syntax.Index(base=base, index=index):
            return steps.At(resolve(base, scope), resolve(index, scope))
        case syntax.TypeTest(operator=operator, operand=operand, type=type_):
            return _type_test(operator, resolve(operand, scope), type_)
        case syntax.Sign(operator=operator, operand=operand):
            inner = resolve(operand, scope)
            if isinstance(inner, nodes.Constant) and isinstance(inner.constant, int):
                return nodes.Constant(-inner.constant if operator == "-" else inner.constant, inner.types)
            return steps.Scalar(scalars.negate, inner, types=inner.types) if operator == "-" else inner
        case syntax.Operation(operator=operator, left=left, right=right):
            return _operation(operator, resolve(left, scope), resolve(right, scope))
    raise NotCompiled(type(tree).__name__)


def _is_root_name(name: str, scope: Scope) -> bool:
    return (
        name[0].isupper()
        and scope.root is not None
        and (name == scope.root or r4().is_a(scope.root, name))
        and (scope.this.types is None or scope.root in scope.this.types)
    )


def _literal(tree: syntax.Literal) -> Expr:
    if tree.type == "empty":
        return nodes.Nothing()
    if tree.type == "Quantity":
        unit = {"code": tree.unit} if tree.unit else {}
        return nodes.Constant({"value": tree.value, **unit}, frozenset({"Quantity"}))
    return nodes.Constant(tree.value, frozenset({tree.type}))


def _constant(name: str, scope: Scope) -> Expr:
    if name in scope.constants:
        return scope.constants[name]
    if name in _URLS:
        return nodes.Constant(_URLS[name], _STRING)
    if name.startswith("vs-"):
        return nodes.Constant(f"http://hl7.org/fhir/ValueSet/{name[3:]}", _STRING)
    if name.startswith("ext-"):
        return nodes.Constant(f"http://hl7.org/fhir/StructureDefinition/{name[4:]}", _STRING)
    match name:
        case "context":
            return nodes.Focus(frozenset({scope.root}) if scope.root else None, "context")
        case "resource":
            return nodes.Focus(scope.resource, "resource")
        case "rootResource":
            return nodes.Focus(None, "root")
    known = (*scope.constants, *_URLS, "context", "resource", "rootResource")
    raise FhirPathError(f'there is no constant "%{name}"{suggest_name(name, known)}')


def navigate(base: Expr, name: str) -> Expr:
    """``base.name``."""
    if isinstance(base, nodes.Nothing) or (base.types is not None and not base.types):
        return nodes.Nothing(many=True)
    if base.types is None or base.types & {"Resource", "DomainResource"}:
        return _navigate_open(base, name)
    model = r4()
    if name in ("extension", "id") and all(model.is_primitive(type_) for type_ in base.types):
        return navigate(base.sibling(), name)
    if isinstance(base, nodes.Navigation) and len(base.keys) > 1:
        base = base.having(name)
    found = {type_: element for type_ in sorted(base.types or ()) if (element := model.element(type_, name))}
    if not found:
        raise FhirPathError(_unknown(base.types or frozenset(), name))
    keys = {
        tuple(nodes.Key(json_name, type_, element.many) for json_name, type_ in element.json_names())
        for element in found.values()
    }
    return nodes.Navigation(base, keys.pop()) if len(keys) == 1 else nodes.Members(base, name)


def _unknown(types: frozenset[str], name: str) -> str:
    model = r4()
    shown = " or ".join(sorted(types))
    elements = {element for type_ in types if type_ in model.types for element in model.types[type_].elements}
    for type_ in types:
        if type_ in model.types and name in model.types[type_].json:
            element, chosen = model.types[type_].json[name]
            return f'{shown} has no element "{name}"; write {element.name}.ofType({chosen})'
    return f'{shown} has no element "{name}"{suggest_name(name, elements)}'


def _navigate_open(base: Expr, name: str) -> Expr:
    """An element of something whose type is not known: any type might have it."""
    model = r4()
    element = model.element("Resource", name)
    if base.types is not None and element is not None:
        return nodes.Navigation(base, tuple(nodes.Key(key, t, element.many) for key, t in element.json_names()))
    known = {element for type_ in model.types.values() for element in type_.elements}
    if name not in known and name != "resourceType":
        raise FhirPathError(f'no type has an element "{name}"{suggest_name(name, known)}')
    return nodes.Members(base, name)


_SYSTEM_TYPES = {"Boolean", "String", "Integer", "Decimal", "Date", "DateTime", "Time"}


def type_name(written: str) -> str:
    """The name of a FHIR type, however qualified. Raises FhirPathError if there is none."""
    space, _, name = written.rpartition(".")
    if space in ("", "System") and name in _SYSTEM_TYPES:
        return name[0].lower() + name[1:]
    if space in ("", "FHIR", "System") and name in r4().types:
        return name
    raise FhirPathError(f'there is no type "{written}"{suggest_name(name, r4().types)}')


def _type_test(operator: str, operand: Expr, written: str) -> Expr:
    wanted = type_name(written)
    return logic.Is(operand, wanted) if operator == "is" else operand.narrow(wanted)


def _operation(operator: str, left: Expr, right: Expr) -> Expr:
    match operator:
        case "and":
            return logic.And(left, right)
        case "or":
            return logic.Or(left, right)
        case "xor":
            return logic.Xor(left, right)
        case "implies":
            return logic.Or(logic.Not(left), right)
        case "=" | "!=":
            return logic.Equality(left, right, wanted=operator == "=")
        case "~" | "!~":
            return logic.Equivalence(left, right, wanted=operator == "~")
        case "<" | ">" | "<=" | ">=":
            return logic.Order(operator, left, right)
        case "in":
            return logic.Contains(left, right)
        case "contains":
            return logic.Contains(right, left)
        case "|":
            return logic.Union(left, right)
        case "&":
            return steps.Applied(scalars.concatenate, left, right, types=_STRING, many=False)
    kinds = {logic.kind(left.types), logic.kind(right.types)}
    if kinds & {"moment", "time", "Quantity"}:
        raise NotCompiled("arithmetic of dates and quantities")
    types: Types = frozenset({"decimal"})
    if operator == "+" and kinds == {"text"}:
        types = _STRING
    elif operator == "div" or (
        operator != "/" and all(t <= logic.INTEGERS for t in (left.types, right.types) if t is not None)
    ):
        types = _INTEGER
    return steps.Scalar(_ARITHMETIC[operator], left, right, types=types)


def _call(call: syntax.Call, scope: Scope) -> Expr:
    name = call.name
    if name not in _KNOWN and name not in scope.hooks:
        raise FhirPathError(f"there is no function {name}(){suggest_name(name, (*_KNOWN, *scope.hooks))}")
    base = scope.this if call.base is None else resolve(call.base, scope)
    if name in scope.hooks:
        hook = Function(scope.hooks[name], _BOOLEAN, 0, 9)
        return _scalar(hook, base, [resolve(each, scope) for each in call.arguments])
    if name in _WITH_CRITERIA and (call.arguments or name in ("repeat", "iif")):
        return _with_criteria(call, base, scope)
    if name in ("ofType", "as", "is"):
        _arguments(call, 1, 1)
        return _type_test("is" if name == "is" else "as", base, _type_argument(call.arguments[0]))
    if name == "getReferenceKey":
        _arguments(call, 0, 1)
        wanted = type_name(_type_argument(call.arguments[0])) if call.arguments else None
        return _scalar_each(base, lambda reference: runtime.reference_key(reference, wanted))
    arguments = [resolve(argument, scope) for argument in call.arguments]
    for table, build in ((SCALARS, _scalar), (COLLECTIONS, _collection)):
        if function := table.get(name):
            _arguments(call, function.least, function.most)
            if function.takes and logic.kind(base.types) not in (function.takes, None):
                raise FhirPathError(f"{name}() takes a {function.takes}, not a {logic.kind(base.types)}")
            return build(function, base, arguments)
    if function := VALUES.get(name):
        return steps.Scalar(function.template, types=function.types)
    return _other(call, base, arguments)


def _arguments(call: syntax.Call, least: int, most: int) -> None:
    if not least <= len(call.arguments) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise FhirPathError(f"{call.name}() takes {wanted} arguments, not {len(call.arguments)}")


def _type_argument(tree: syntax.Syntax) -> str:
    match tree:
        case syntax.Member(base=None, name=name):
            return name
        case syntax.Member(base=syntax.Member(base=None, name=space), name=name):
            return f"{space}.{name}"
        case syntax.Literal(type="string", value=str(name)):
            return name
    raise FhirPathError("a type is written as its name: Patient, FHIR.Quantity, System.String")


def _given(types: Types, base: Expr) -> Types:
    return base.types if types is SAME else types


def _scalar(function: Function, base: Expr, arguments: list[Expr]) -> Expr:
    return steps.Scalar(function.template, base, *arguments, types=_given(function.types, base), many=function.many)


def _collection(function: Function, base: Expr, arguments: list[Expr]) -> Expr:
    types = _given(function.types, base)
    if function.many and function.types is SAME and arguments and types is not None:
        types = None if arguments[0].types is None else types | arguments[0].types
    return steps.Applied(function.template, base, *arguments, types=types, many=function.many)


def _scalar_each(base: Expr, function: Callable[..., object]) -> Expr:
    """A function of each item of ``base``."""
    inner = steps.Scalar(function, nodes.Focus(base.types), types=_STRING)
    return steps.Select(base, inner) if base.many else steps.Scalar(function, base, types=_STRING)


def _with_criteria(call: syntax.Call, base: Expr, scope: Scope) -> Expr:
    _arguments(call, 2 if call.name == "iif" else 1, {"iif": 3, "trace": 2, "aggregate": 2}.get(call.name, 1))
    if call.name == "aggregate":
        raise NotCompiled("aggregate()")
    if call.name == "trace":
        return base
    if call.name == "iif":
        there = replace(scope, this=base)
        criterion, then, *otherwise = (resolve(argument, there) for argument in call.arguments)
        return steps.Iif(criterion, then, otherwise[0] if otherwise else nodes.Nothing())
    indexed = any(each == "$index" for each in syntax.specials(call.arguments[0]))
    criteria = resolve(call.arguments[0], scope.inside(base))
    match call.name:
        case "where":
            return steps.Where(base, criteria, indexed=indexed)
        case "select":
            return steps.Select(base, criteria, indexed=indexed)
        case "exists":
            return logic.Exists(steps.Where(base, criteria, indexed=indexed))
        case "all":
            return logic.All(base, criteria)
    return steps.Repeat(base, criteria)


def _other(call: syntax.Call, base: Expr, arguments: list[Expr]) -> Expr:
    name = call.name
    if name in ("skip", "take", "union", "extension"):
        _arguments(call, 1, 1)
    elif name == "join":
        _arguments(call, 0, 1)
    elif name in _OTHERS:
        _arguments(call, 0, 0)
    match name:
        case "exists" | "empty":
            return logic.Exists(base, wanted=name == "exists")
        case "not":
            return logic.Not(base)
        case "count":
            return steps.Count(base)
        case "hasValue":
            return logic.HasValue(base)
        case "first":
            return steps.At(base, nodes.Constant(0, _INTEGER))
        case "last":
            return steps.At(base, None)
        case "tail":
            return steps.Slice(base, "[1:]", nodes.Constant(1, _INTEGER))
        case "skip":
            return steps.Slice(base, "[{}:]", arguments[0])
        case "take":
            return steps.Slice(base, "[:{}]", arguments[0])
        case "union":
            return logic.Union(base, arguments[0])
        case "extension":
            extensions = navigate(base, "extension")
            url = navigate(nodes.Focus(extensions.types), "url")
            return steps.Where(extensions, logic.Equality(url, arguments[0]))
        case "join":
            return steps.Join(base, arguments[0] if arguments else nodes.Constant("", _STRING))
        case "descendants":
            return steps.Descendants(base)
        case "resolve":
            return steps.Resolved(base)
        case "lowBoundary" | "highBoundary":
            return _boundary(base, high=name == "highBoundary")
    raise NotCompiled(f"{name}()")


def _boundary(base: Expr, *, high: bool) -> Expr:
    """``lowBoundary()``, ``highBoundary()``: by the type of the value, else by its look."""
    types = base.types
    only = next(iter(types)) if types is not None and len(types) == 1 else None
    function: Callable[..., object] = BOUNDARIES.get(only or "", moments.boundary)
    given = frozenset({"decimal"}) if only == "integer" else types
    return steps.Scalar(function, base, nodes.Constant(high, _BOOLEAN), types=given)
