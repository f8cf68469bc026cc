"""The complete validation: traverses a parsed resource along the rules and reports every issue with its path.

The walker decides which resources are valid. The fast path must only accept resources for which the walker finds no
issue.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fhir_assets.fhir.validation import invariants
from fhir_assets.fhir.validation.bindings import allows_code, allows_coding
from fhir_assets.fhir.validation.issues import (
    CARDINALITY,
    INVARIANT,
    MAX_ISSUES,
    REFERENCE_TARGET,
    REQUIRED_BINDING,
    STRUCTURE,
    Issue,
    IssueList,
    Severity,
)
from fhir_assets.fhir.validation.primitives import check_primitive
from fhir_assets.fhir.validation.references import ANY, resolve_target_type
from fhir_assets.fhir.validation.rules import PRIMITIVES, Element, Rules, Structure
from fhir_assets.fhir.validation.strict_json import child_path

Json = dict[str, Any]

ABSENT = object()
"""The value of a property that JSON does not have, as opposed to ``null``."""


@dataclass(slots=True)
class Scope:
    """The resource that is being traversed.

    ``resource`` is ``%resource``, ``root`` is ``%rootResource``, and ``contained`` has the types of the contained
    resources by id. ``broken`` is True if the elements have issues; ``pending`` are the invariants to evaluate after
    the elements, as structure, value and path.
    """

    resource: Json
    root: Json
    contained: Mapping[str, str]
    is_contained: bool = False
    broken: bool = False
    pending: list[tuple[Structure, Json, str]] = field(default_factory=list)


class Walker:
    """Finds the issues of one resource. An instance serves one resource only.

    The issues are in document order; the invariants of a resource follow its elements. ``demote`` returns each issue
    with its final severity, before those beyond the limit are dropped.
    """

    def __init__(
        self, rules: Rules, demote: Callable[[Issue], Issue] = lambda issue: issue, max_issues: int = MAX_ISSUES
    ) -> None:
        self.rules = rules
        self._demote = demote
        self._issues = IssueList(max_issues)

    def add(self, rule: str, path: str, message: str, severity: Severity = "error") -> None:
        """Record an issue."""
        self._issues.add(self._demote(Issue(rule, severity, path, message)))

    def walk(self, value: Any) -> tuple[Issue, ...]:
        """Return the issues of parsed JSON: at most ``max_issues`` of each severity, and the number of the others."""
        self._walk_resource(value, "", None)
        return self._issues.close()

    def _walk_resource(self, value: Any, path: str, container: Scope | None) -> None:
        if not isinstance(value, dict):
            return self.add(STRUCTURE, path or "Resource", "expected a resource: an object with a resourceType")
        name = value.get("resourceType")
        if not isinstance(name, str):
            return self.add(STRUCTURE, path or "Resource", "a resource needs a resourceType")
        if name not in self.rules.resource_types:
            return self.add(STRUCTURE, path or "Resource", "the resourceType is not one of FHIR R4")
        if container is None:
            scope = Scope(value, value, _contained_types(value))
        else:
            scope = Scope(value, container.root, container.contained, is_contained=True)
        before = self._issues.count
        self._walk_object(self.rules.structure(name), value, path or name, scope)
        scope.broken = self._issues.count > before
        for structure, focus, location in scope.pending:
            self._check_invariants(structure.name, structure.invariants, focus, location, scope)
        return None

    def _walk_object(self, structure: Structure, value: Any, path: str, scope: Scope) -> None:
        if not isinstance(value, dict):
            return self.add(STRUCTURE, path, "expected an object")
        if not value:
            return self.add(STRUCTURE, path, "an object must not be empty; leave the element out")
        seen = self._walk_properties(structure, value, path, scope)
        for element in structure.required:
            if element.name not in seen:
                self.add(CARDINALITY, f"{path}.{element.name}", "a required element is missing")
        if not structure.is_resource and value.keys() == {"id"}:
            self.add(INVARIANT + "ele-1", path, "an element needs a value or children, not only an id")
        if structure.invariants:
            scope.pending.append((structure, value, path))
        return None

    def _walk_properties(self, structure: Structure, value: Json, path: str, scope: Scope) -> dict[str, str]:
        """Validate the properties of an object. Return the names of its elements, with the JSON name of each."""
        seen: dict[str, str] = {}
        for name, child in value.items():
            plain = name.removeprefix("_")
            known = structure.properties.get(plain)
            if known is None or (plain != name and known[1] not in PRIMITIVES):
                if not (name == "resourceType" and structure.is_resource):
                    self.add(STRUCTURE, child_path(path, name), f"{structure.name} has no such element")
                continue
            element, type_ = known
            if seen.setdefault(element.name, plain) != plain:
                self.add(CARDINALITY, f"{path}.{element.name}", "at most one type of this element may be given")
            if type_ not in PRIMITIVES:
                self._walk_complex(element, type_, child, f"{path}.{element.name}", scope)
            elif plain == name:
                self._walk_primitive(
                    element, type_, child, value.get("_" + name, ABSENT), f"{path}.{element.name}", scope
                )
            elif plain not in value:
                self._walk_primitive(element, type_, ABSENT, child, f"{path}.{element.name}", scope)
        return seen

    def _walk_complex(self, element: Element, type_: str, value: Any, path: str, scope: Scope) -> None:
        if not self._has_right_shape(element, value, path):
            return
        for item, location in _items(element, value, path):
            if item is None:
                self.add(STRUCTURE, location, "null is not allowed; leave the element out")
            elif type_ == "Resource":
                self._walk_nested(element, item, location, scope)
            else:
                structure = self.rules.structure(type_)
                self._walk_object(structure, item, location, scope)
                if isinstance(item, dict):
                    self._check_complex(element, type_, item, location, scope)

    def _walk_nested(self, element: Element, item: Any, path: str, scope: Scope) -> None:
        if element.name != "contained":
            self._walk_resource(item, path, None)
        elif scope.is_contained:
            self.add(INVARIANT + "dom-2", path, "a contained resource must not contain other resources")
        else:
            self._walk_resource(item, path, scope)

    def _check_complex(self, element: Element, type_: str, item: Json, path: str, scope: Scope) -> None:
        if type_ == "Reference":
            self._check_reference(element, item, path, scope)
        if element.value_set is not None and type_ == "CodeableConcept":
            codings = item.get("coding")
            codings = codings if isinstance(codings, list) else []
            if not any(isinstance(c, dict) and allows_coding(element.value_set, c) for c in codings) and (
                codings or "text" in item or "extension" not in item
            ):
                self.add(REQUIRED_BINDING, path, f"no coding is in the value set {element.value_set}")
        if element.invariants:
            self._check_invariants(type_, element.invariants, item, path, scope)

    def _walk_primitive(
        self, element: Element, type_: str, value: Any, companion: Any, path: str, scope: Scope
    ) -> None:
        if value is not ABSENT and not self._has_right_shape(element, value, path):
            return
        if companion is not ABSENT and not self._has_right_shape(element, companion, path):
            return
        if not element.is_list:
            if value is None:
                self.add(STRUCTURE, path, "null is not allowed; leave the element out")
            elif companion is None:
                self.add(STRUCTURE, path, "null is not allowed in addition to a value; leave the element out")
            else:
                self._check_primitive(element, type_, value, companion, path, scope)
            return
        values = [] if value is ABSENT else value
        companions = [] if companion is ABSENT else companion
        if value is not ABSENT and companion is not ABSENT and len(values) != len(companions):
            self.add(STRUCTURE, path, "the array of values and the array of their extensions differ in length")
        for n in range(max(len(values), len(companions))):
            item = values[n] if n < len(values) else None
            extra = companions[n] if n < len(companions) else None
            location = f"{path}[{n}]"
            if item is None and extra is None:
                self.add(STRUCTURE, location, "null is only allowed for a value that has an extension instead")
            else:
                self._check_primitive(
                    element,
                    type_,
                    ABSENT if item is None else item,
                    ABSENT if extra is None else extra,
                    location,
                    scope,
                )

    def _check_primitive(
        self, element: Element, type_: str, value: Any, companion: Any, path: str, scope: Scope
    ) -> None:
        if companion is not ABSENT:
            self._check_companion(companion, value is ABSENT, path, scope)
        if value is ABSENT:
            return
        problem = check_primitive(type_, value)
        if problem is not None:
            self.add(problem[0], path, *problem[1:])
        elif element.value_set is not None and type_ == "code" and not allows_code(element.value_set, value):
            self.add(REQUIRED_BINDING, path, f"the code is not in the value set {element.value_set}")
        elif element.invariants:
            self._check_invariants(type_, element.invariants, value, path, scope)

    def _check_companion(self, companion: Any, alone: bool, path: str, scope: Scope) -> None:
        if isinstance(companion, dict) and companion.keys() == {"id"} and not alone:
            self._check_primitive(_ELEMENT_ID, "Element.id", companion["id"], ABSENT, f"{path}.id", scope)
        else:
            self._walk_object(self.rules.structure("Element"), companion, path, scope)

    def _has_right_shape(self, element: Element, value: Any, path: str) -> bool:
        if value is None and not element.is_list:
            return True
        if element.is_list and not isinstance(value, list):
            self.add(STRUCTURE, path, "this element repeats: expected an array")
        elif element.is_list and not value:
            self.add(STRUCTURE, path, "an array must not be empty; leave the element out")
        elif not element.is_list and isinstance(value, list):
            self.add(STRUCTURE, path, "this element does not repeat: expected no array")
        else:
            return True
        return False

    def _check_reference(self, element: Element, value: Json, path: str, scope: Scope) -> None:
        targets = element.targets
        reference, stated = value.get("reference"), value.get("type")
        stated_type = stated if isinstance(stated, str) and stated in self.rules.resource_types else ANY
        target_type = ANY
        if isinstance(reference, str):
            target = resolve_target_type(reference)
            if target is None:
                self.add(REFERENCE_TARGET, path, "expected Type/id with a type of R4, an absolute URL, or # and an id")
                return
            target_type = target
            if reference == "#":
                target_type = str(scope.root.get("resourceType"))
            elif reference.startswith("#"):
                target_type = scope.contained.get(reference[1:], ANY)
                if reference[1:] not in scope.contained:
                    self.add(INVARIANT + "ref-1", path, "no contained resource has the id of the reference")
        if target_type and stated_type and target_type != stated_type:
            self.add(REFERENCE_TARGET, path, "the reference and its element type name different resource types")
        if targets and (target_type or stated_type or next(iter(targets))) not in targets:
            self.add(REFERENCE_TARGET, path, f"expected a reference to {' | '.join(sorted(targets))}")

    def _check_invariants(
        self, type_: str, rules: tuple[invariants.Invariant, ...], focus: Any, path: str, scope: Scope
    ) -> None:
        for rule in rules:
            holds = invariants.holds(rule, type_, focus, scope.resource, scope.root)
            if holds is False:
                self.add(
                    INVARIANT + rule.key,
                    path,
                    f"does not hold: {rule.expression}",
                    "error" if rule.severity == "error" else "warning",
                )
            elif holds is None and not scope.broken:
                self.add(INVARIANT + rule.key, path, "could not be evaluated", "warning")


_ELEMENT_ID = Element("id", ("Element.id",), False, False, False, None, frozenset(), ())


def _items(element: Element, value: Any, path: str) -> list[tuple[Any, str]]:
    if element.is_list:
        return [(item, f"{path}[{n}]") for n, item in enumerate(value)]
    return [(value, path)]


def _contained_types(resource: Json) -> dict[str, str]:
    contained = resource.get("contained")
    return {
        item["id"]: str(item.get("resourceType"))
        for item in (contained if isinstance(contained, list) else ())
        if isinstance(item, dict) and isinstance(item.get("id"), str)
    }
