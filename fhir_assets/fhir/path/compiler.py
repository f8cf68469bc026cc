"""The entry point of the FHIRPath compiler: ``compile_path`` turns an expression into a ``CompiledPath``."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

from typing_extensions import override

from fhir_assets.errors import FhirPathError
from fhir_assets.fhir.model import r4, suggest_name
from fhir_assets.fhir.path import expressions, resolver, syntax
from fhir_assets.fhir.path.emitter import Emitter
from fhir_assets.fhir.path.expressions import Constant, Expression, NotCompiled, Types
from fhir_assets.fhir.path.runtime import NOT_FHIR

Function = Callable[[Any, Any, Any], Any]


class Fallback(Expression):
    """An expression that the compiler does not support; fhirpathpy evaluates it.

    Evaluation is slow: each call copies the resource and interprets the expression.
    """

    many = True
    types: Types = None

    def __init__(self, expression: str, focus: Types, constants: Mapping[str, Expression]) -> None:
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
                values = evaluate(deepcopy(focus), path, context, model)
            except Exception as error:  # fhirpathpy raises Exception itself, with values in the message
                kind = type(error).__name__
                raise FhirPathError(f'"{expression}" cannot be evaluated on this resource ({kind})') from None
            return [str(value) if isinstance(value, FP_Type) else value for value in values]

        self._function = fallback

    @override
    def emit_value(self, out: Emitter) -> str:
        return out.let(f"{out.bind(self._function)}({out.focus}, {out.resource}, {out.root})")


def resolve_expression(
    expression: str,
    *,
    focus: Types,
    root: str | None = None,
    resource: str | None = None,
    constants: Mapping[str, Expression] | None = None,
    hooks: Mapping[str, Callable[..., object]] | None = None,
) -> Expression:
    """Parse and resolve an expression for a focus of these types.

    ``root`` is the type whose name a path may begin with, ``resource`` the type of ``%resource``. Returns a Fallback
    if the compiler does not support the expression. Raises FhirPathError if the expression cannot be parsed or refers
    to an unknown name.
    """
    scope = resolver.Scope(
        this=expressions.Focus(focus),
        root=root,
        resource=frozenset({resource}) if resource else None,
        constants=constants or {},
        hooks=hooks or {},
    )
    tree = syntax.parse(expression)
    try:
        resolved = resolver.resolve(tree, scope)
        resolved.emit_value(Emitter("focus", "resource", "root"))  # raises NotCompiled for the remaining constructs
    except NotCompiled:
        return Fallback(expression, focus, constants or {})
    return resolved


class CompiledPath:
    """A compiled expression.

    ``types`` are the FHIR types that its values may have, None if they depend on the resource; ``many`` is True if it
    may return several values; ``fallback`` is True if it runs in fhirpathpy instead of compiled code.
    """

    def __init__(self, expression: str, expr: Expression, *, empty_join: bool = True) -> None:
        self.expression = expression
        self._empty_join = empty_join
        self.types = expr.types
        self.many = expr.many
        self.fallback = isinstance(expr, Fallback)
        self._expr = expr

    def __call__(self, focus: Any, *, resource: Any = None, root: Any = None) -> list[Any]:
        """Return all values of the expression on ``focus``.

        ``resource`` is ``%resource``, by default the focus; ``root`` is ``%rootResource``, by default ``resource``.
        Raises FhirPathError if the expression cannot be evaluated on this resource.
        """
        resource = focus if resource is None else resource
        return self._guard(self.function, focus, resource, resource if root is None else root)  # type: ignore[no-any-return]

    def test(self, focus: Any, *, resource: Any = None, root: Any = None) -> bool | None:
        """Evaluate the expression as a criterion: True, False, or None if its result is empty.

        Raises FhirPathError if the expression cannot be evaluated on this resource.
        """
        resource = focus if resource is None else resource
        return self._guard(self.predicate, focus, resource, resource if root is None else root)  # type: ignore[no-any-return]

    def _guard(self, function: Function, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except NOT_FHIR as error:
            raise FhirPathError(
                f'"{self.expression}" cannot be evaluated on this resource ({type(error).__name__}): '
                "an element does not have the type that FHIR R4 defines"
            ) from None

    @cached_property
    def function(self) -> Function:
        """The compiled function of (focus, %resource, %rootResource), which returns a list.

        It may raise any error of ``runtime.NOT_FHIR`` on data that is not FHIR.
        """
        out = self._emitter()
        out.line(f"return list({self._expr.emit_items(out)})")
        return out.function("path", "focus, resource, root")

    @cached_property
    def predicate(self) -> Function:
        """The compiled function of (focus, %resource, %rootResource), which returns True, False or None."""
        out = self._emitter()
        true, false = self._expr.emit_conditions(out)
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
    """Compile an expression for a focus of ``root_type``.

    ``root_type`` is the name of a resource type, a data type or a nested type (``Patient.contact``); None allows any.
    ``resource_type`` is the type of ``%resource`` if the focus is not a resource. ``constants`` maps names to strings,
    numbers and booleans, or to a Constant for any other FHIR type. ``hooks`` maps names of additional FHIRPath
    functions, such as ``htmlChecks`` and ``memberOf``, to Python functions that take the value and the arguments and
    return True, False or None. ``empty_join`` is described in CompiledViews.

    Raises FhirPathError if the expression cannot be parsed, or if it names an element, a function, a type or a
    constant that does not exist; the message then suggests the nearest existing name.
    """
    if root_type is not None and root_type not in r4().types:
        raise FhirPathError(f'there is no type "{root_type}"{suggest_name(root_type, r4().types)}')
    is_resource = root_type is not None and r4().types[root_type].kind == "resource"
    expr = resolve_expression(
        expression,
        focus=frozenset({root_type}) if root_type else None,
        root=root_type,
        resource=resource_type or (root_type if is_resource else None),
        constants={name: as_constant(value) for name, value in (constants or {}).items()},
        hooks=hooks,
    )
    return CompiledPath(expression, expr, empty_join=empty_join)


def as_constant(value: object) -> Constant:
    """Convert a Python value to a FHIRPath constant."""
    if isinstance(value, Constant):
        return value
    name = {bool: "boolean", int: "integer", str: "string"}.get(type(value), "decimal")
    return Constant(value, frozenset({name}))
