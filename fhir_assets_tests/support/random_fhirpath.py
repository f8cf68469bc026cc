"""Hypothesis strategies for resources, FHIRPath expressions and ViewDefinitions.

Tests evaluate them with the compiler and with another evaluator and compare the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from fhir_assets.fhir.model import r4

ELEMENTS: dict[str, tuple[str, ...]] = {
    "Patient": (
        *("id", "active", "gender", "birthDate", "deceased", "multipleBirth"),
        *("name", "telecom", "contact", "maritalStatus", "extension"),
    ),
    "Patient.contact": ("gender", "name", "telecom", "period"),
    "HumanName": ("use", "family", "given", "period"),
    "ContactPoint": ("system", "value", "rank"),
    "Period": ("start", "end"),
    "CodeableConcept": ("coding", "text"),
    "Coding": ("system", "code"),
    "Extension": ("url", "value"),
    "Observation": ("id", "status", "code", "value", "effective", "component"),
    "Observation.component": ("code", "value"),
    "Quantity": ("value", "unit"),
}
"""The elements of generated resources, by type. They are few, so that random paths often have values."""
CHOICES = {
    "Patient.deceased": ("boolean", "dateTime"),
    "Patient.multipleBirth": ("boolean", "integer"),
    "Extension.value": ("boolean", "code"),
    "Observation.value": ("Quantity", "string", "CodeableConcept"),
    "Observation.component.value": ("Quantity", "string"),
    "Observation.effective": ("dateTime", "Period"),
}
"""The types that generated choice elements may have."""
POOLS: dict[str, tuple[Any, ...]] = {
    "boolean": (True, False),
    "integer": (0, 1, 2),
    "positiveInt": (1, 2),
    "decimal": (0, 1, 1.5, 2.25, 10),
    "date": ("1970", "1970-06", "1970-06-15", "1980-01-01"),
    "dateTime": ("1970-06-15", "1980-01-01", "2010-10-10T10:00:00Z", "2010-10-10T12:00:00+02:00"),
}
"""The values of generated primitives, by type; all other types use ``TEXTS``."""
TEXTS = ("official", "usual", "Ann", "Bo", "ann b", "12")
NUMBERS = {"integer", "positiveInt", "decimal"}
DATES = {"date", "dateTime"}


def list_types(owner: str, name: str) -> tuple[str, ...]:
    """Return the types that a generated element may have."""
    element = r4().element(owner, name)
    assert element is not None
    return CHOICES[f"{owner}.{name}"] if element.choice else element.types


@st.composite
def objects(draw: st.DrawFn, type_: str) -> dict[str, Any]:
    """Generate a resource or an object of a complex type."""
    generated: dict[str, Any] = {"resourceType": type_} if type_ in ("Patient", "Observation") else {}
    for name in ELEMENTS[type_]:
        element = r4().element(type_, name)
        assert element is not None
        if not draw(st.booleans()):
            continue
        chosen = draw(st.sampled_from(list_types(type_, name)))
        key = f"{name}{chosen[0].upper()}{chosen[1:]}" if element.choice else name
        value = values(chosen)
        generated[key] = draw(st.lists(value, min_size=1, max_size=3)) if element.many else draw(value)
    return generated


def values(type_: str) -> st.SearchStrategy[Any]:
    """Generate a value of a type."""
    if type_ in ELEMENTS:
        return objects(type_).filter(bool)  # FHIR does not allow empty objects
    return st.sampled_from(POOLS.get(type_, TEXTS))


@dataclass(frozen=True)
class Path:
    """A path with the type of its values; ``many`` is True if it may have several values."""

    text: str
    type: str
    many: bool

    def then(self, step: str, type_: str, *, many: bool | None = None) -> "Path":
        """Return the path with one more step."""
        return Path(f"{self.text}.{step}" if self.text else step, type_, self.many if many is None else many)


@st.composite
def elements(draw: st.DrawFn, root: str, *, steps: int = 3) -> Path:
    """Generate a path of element names, with filters and subsets between them."""
    path = Path("", root, False)
    for _ in range(draw(st.integers(1, steps))):
        if path.type not in ELEMENTS:
            break
        path = draw(_step(path))
    return path


@st.composite
def _step(draw: st.DrawFn, path: Path) -> Path:
    owner = path.type
    name = draw(st.sampled_from(ELEMENTS[owner]))
    element = r4().element(owner, name)
    assert element is not None
    chosen = draw(st.sampled_from(list_types(owner, name)))
    path = path.then(name, chosen, many=path.many or element.many)
    if element.choice:
        path = path.then(f"ofType({chosen})", chosen)
    if not path.many:
        return path
    match draw(st.integers(0, 9)):
        case 0:
            return path.then("first()", chosen, many=False)
        case 1:
            return path.then("last()", chosen, many=False)
        case 2:
            return Path(f"{path.text}[{draw(st.integers(0, 2))}]", chosen, False)
        case 3:
            return path.then(draw(st.sampled_from(("tail()", "skip(1)", "take(1)", "take(2)"))), chosen)
        case 4 | 5 if chosen in ELEMENTS:
            return path.then(f"where({draw(conditions(chosen, depth=1))})", chosen)
    return path


@st.composite
def comparisons(draw: st.DrawFn, root: str) -> str:
    """Generate a comparison of a single value with a literal."""
    path = draw(elements(root, steps=2).filter(lambda path: path.type not in ELEMENTS))
    text = path.text if not path.many else f"{path.text}.first()"
    if path.type == "boolean":
        return f"{text} = {draw(st.sampled_from(('true', 'false')))}"
    if path.type in NUMBERS:
        operator = draw(st.sampled_from(("=", "!=", "<", "<=", ">", ">=")))
        return f"{text} {operator} {draw(st.sampled_from(('1', '2', '1.5')))}"
    if path.type in DATES:
        return f"{text} {draw(st.sampled_from(('=', '<', '>=')))} @1970-06-15"
    literal = f"'{draw(st.sampled_from(TEXTS))}'"
    match draw(st.integers(0, 4)):
        case 0:
            return f"{text}.startsWith({literal})"
        case 1:
            return f"{text} in ('official' | {literal})"
        case 2:
            return f"{text} != {literal}"
    return f"{text} = {literal}"


@st.composite
def conditions(draw: st.DrawFn, root: str, *, depth: int = 2) -> str:
    """Generate a boolean expression."""
    if depth and draw(st.booleans()):
        left, right = draw(conditions(root, depth=depth - 1)), draw(conditions(root, depth=depth - 1))
        operator = draw(st.sampled_from(("and", "or", "xor", "implies")))
        return f"({left}) {operator} ({right})"
    match draw(st.integers(0, 5)):
        case 0 | 1:
            path = draw(elements(root, steps=2))
            return f"{path.text}.{draw(st.sampled_from(('exists()', 'empty()', 'exists().not()')))}"
        case 2 if depth:
            path = draw(elements(root, steps=1))
            if path.type in ELEMENTS:
                function = draw(st.sampled_from(("exists", "all")))
                return f"{path.text}.{function}({draw(conditions(path.type, depth=depth - 1))})"
    return draw(comparisons(root))


@st.composite
def paths(draw: st.DrawFn, root: str) -> str:
    """Generate a path for a column."""
    path = draw(elements(root))
    match draw(st.integers(0, 11)):
        case 0:
            return draw(conditions(root))
        case 1:
            return f"{path.text}.count()"
        case 2:
            return f"{path.text}.{draw(st.sampled_from(('exists()', 'empty()', 'isDistinct()', 'distinct().count()')))}"
        case 3 if path.type in ("string", "code"):
            return f"{path.text}.join(',')" if path.many else f"{path.text}.{draw(texts())}"
        case 4 if path.type in NUMBERS and not path.many:
            return f"{path.text} {draw(st.sampled_from('+-*'))} 2"
        case 5:
            return f"({path.text} | {draw(elements(root)).text})"
        case 6:
            return f"iif({draw(conditions(root, depth=1))}, {path.text}, {{}})"
        case 7 if path.type in ELEMENTS:
            inner = draw(elements(path.type, steps=2))
            return f"{path.text}.select({inner.text})"
    return path.text


def texts() -> st.SearchStrategy[str]:
    """Generate a call of a string function."""
    return st.sampled_from(
        (
            *("upper()", "lower()", "length()", "substring(1)", "substring(0, 2)", "contains('n')", "endsWith('l')"),
            *("matches('^[A-Z]')", "replace('n', 'm')", "indexOf('o')", "toInteger()", "toString()"),
        )
    )


@st.composite
def selects(draw: st.DrawFn, root: str, names: Sequence[str], *, depth: int = 1) -> dict[str, Any]:
    """Generate a ``select`` whose columns have these names."""
    select: dict[str, Any] = {}
    if depth and draw(st.booleans()):
        over = draw(elements(root, steps=2).filter(lambda path: path.type in ELEMENTS))
        select[draw(st.sampled_from(("forEach", "forEachOrNull")))] = over.text
        root = over.type
    own = draw(st.integers(1, len(names)))
    select["column"] = [{"name": name, "path": draw(paths(root)), "collection": True} for name in names[:own]]
    rest = names[own:]
    if not rest:
        return select
    if depth and draw(st.booleans()):
        branches = draw(st.integers(1, 2))
        select["unionAll"] = [draw(selects(root, rest, depth=depth - 1)) for _ in range(branches)]
    else:
        select["select"] = [draw(selects(root, rest, depth=depth))]
    return select


@st.composite
def views(draw: st.DrawFn, root: str) -> dict[str, Any]:
    """Generate a ViewDefinition."""
    view: dict[str, Any] = {
        "resource": root,
        "select": [draw(selects(root, ("a", "b", "c"))), draw(selects(root, ("d", "e")))],
    }
    if draw(st.booleans()):
        view["where"] = [{"path": draw(conditions(root, depth=1))}]
    return view
