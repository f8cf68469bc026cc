"""FHIRPath expressions as Python functions."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.model import r4, suggest_name
from fhir_assets.fhir.path import nodes, resolve, syntax
from fhir_assets.fhir.path.emitter import Emitter
from fhir_assets.fhir.path.nodes import Constant, Expr, NotCompiled, Types
from fhir_assets.fhir.path.runtime import NOT_FHIR

Function = Callable[[Any, Any, Any], Any]


class Fallback(Expr):
    """What the compiler leaves to fhirpathpy, which copies the resource and walks the tree anew each time."""

    many = True
    types: Types = None

    def __init__(self, expression: str, focus: Types, constants: Mapping[str, Expr]) -> None:
        import fhirpathpy
        from fhirpathpy.engine.nodes import FP_Type
        from fhirpathpy.models import models

        base = next(iter(focus)) if focus is not None and len(focus) == 1 else None
        typed_base = base is not None and r4().types[base].kind != "resource"
        path = {"base": base, "expression": expression} if typed_base else expression
        evaluate, model = fhirpathpy.evaluate, models["r4"]
        variables = {name: value.constant for name, value in constants.items() if isinstance(value, Constant)}

        def fallback(focus: Any, resource: Any, root: Any) -> list[Any]:
            context = {**variables, "resource": deepcopy(resource), "rootResource": deepcopy(root)}
            try:
                found = evaluate(deepcopy(focus), path, context, model)
            except Exception as error:  # fhirpathpy raises Exception itself, with values in the message
                kind = type(error).__name__
                raise FhirPathError(f'"{expression}" cannot be evaluated on this resource ({kind})') from None
            return [str(each) if isinstance(each, FP_Type) else each for each in found]

        self._function = fallback

    def value(self, out: Emitter) -> str:
        return out.let(f"{out.bind(self._function)}({out.focus}, {out.resource}, {out.root})")


def typed(
    expression: str,
    *,
    focus: Types,
    root: str | None = None,
    resource: str | None = None,
    constants: Mapping[str, Expr] | None = None,
    hooks: Mapping[str, Callable[..., object]] | None = None,
) -> Expr:
    """The typed expression on a focus of these types; a Fallback if the compiler leaves it to fhirpathpy.

    ``root`` is the type whose name a path may begin with, ``resource`` that of ``%resource``. Raises FhirPathError.
    """
    scope = resolve.Scope(
        this=nodes.Focus(focus),
        root=root,
        resource=frozenset({resource}) if resource else None,
        constants=constants or {},
        hooks=hooks or {},
    )
    tree = syntax.parse(expression)
    try:
        found = resolve.resolve(tree, scope)
        found.value(Emitter("focus", "resource", "root"))
    except NotCompiled:
        return Fallback(expression, focus, constants or {})
    return found


class CompiledPath:
    """An expression ready to run.

    ``types`` are the FHIR types it may give, None if they cannot be known beforehand; ``many`` says whether it may
    give several values; ``fallback`` whether it runs in fhirpathpy instead of compiled code.
    """

    def __init__(self, expression: str, expr: Expr, *, empty_join: bool = True) -> None:
        self.expression = expression
        self._empty_join = empty_join
        self.types = expr.types
        self.many = expr.many
        self.fallback = isinstance(expr, Fallback)
        self._expr = expr

    def __call__(self, focus: Any, *, resource: Any = None, root: Any = None) -> list[Any]:
        """All values. ``resource`` and ``root`` are ``%resource`` and ``%rootResource``: the focus itself if not given.

        Raises FhirPathError if the expression cannot be evaluated on this resource.
        """
        resource = focus if resource is None else resource
        return self._guard(self.function, focus, resource, resource if root is None else root)  # type: ignore[no-any-return]

    def test(self, focus: Any, *, resource: Any = None, root: Any = None) -> bool | None:
        """Whether the expression is true, false or (None) empty. Raises FhirPathError."""
        resource = focus if resource is None else resource
        return self._guard(self.predicate, focus, resource, resource if root is None else root)  # type: ignore[no-any-return]

    def _guard(self, function: Function, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except NOT_FHIR as error:
            raise FhirPathError(
                f'"{self.expression}" cannot be evaluated on this resource ({type(error).__name__}): '
                "an element is not of the type that FHIR R4 gives it"
            ) from None

    @cached_property
    def function(self) -> Function:
        """The compiled function of (focus, %resource, %rootResource), giving a list. May raise any error on data that
        is not FHIR.
        """
        out = self._emitter()
        out.line(f"return list({self._expr.items(out)})")
        return out.function("path", "focus, resource, root")

    @cached_property
    def predicate(self) -> Function:
        """The compiled function of (focus, %resource, %rootResource), giving True, False or None."""
        out = self._emitter()
        true, false = self._expr.logic(out)
        out.line(f"return True if {true} else False if {false} else None")
        return out.function("predicate", "focus, resource, root")

    def _emitter(self) -> Emitter:
        out = Emitter("focus", "resource", "root")
        out.empty_join = self._empty_join
        return out


def compile_path(
    expression: str,
    *,
    root_type: str | None,
    resource_type: str | None = None,
    constants: Mapping[str, object] | None = None,
    hooks: Mapping[str, Callable[..., object]] | None = None,
    empty_join: bool = True,
) -> CompiledPath:
    """Compile an expression for a focus of ``root_type`` (a resource, a datatype, ``Patient.contact``; None: any).

    ``resource_type`` is the type of ``%resource``, if the focus is no resource itself. ``constants`` are strings,
    numbers and booleans by name, or Constant for another FHIR type. ``hooks`` are functions that the caller brings,
    as ``htmlChecks`` and ``memberOf``: they get the value and the arguments, and give True, False or None.
    ``empty_join``: see TypeViews.

    Raises FhirPathError: the expression cannot be read, or it names an element, a function, a type or a constant that
    R4 does not know; the message then has the nearest right name.
    """
    if root_type is not None and root_type not in r4().types:
        raise FhirPathError(f'there is no type "{root_type}"{suggest_name(root_type, r4().types)}')
    is_resource = root_type is not None and r4().types[root_type].kind == "resource"
    expr = typed(
        expression,
        focus=frozenset({root_type}) if root_type else None,
        root=root_type,
        resource=resource_type or (root_type if is_resource else None),
        constants={name: as_constant(value) for name, value in (constants or {}).items()},
        hooks=hooks,
    )
    return CompiledPath(expression, expr, empty_join=empty_join)


def as_constant(value: object) -> Constant:
    """A Python value as a FHIRPath constant."""
    if isinstance(value, Constant):
        return value
    name = {bool: "boolean", int: "integer", str: "string"}.get(type(value), "decimal")
    return Constant(value, frozenset({name}))
