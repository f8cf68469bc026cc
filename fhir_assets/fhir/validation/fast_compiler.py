"""The compiler of the fast path: turns the rules into decoders and check functions.

For each structure the compiler builds a ``msgspec.Struct``, so that the decoder checks names, cardinality, JSON types,
formats, integer ranges and codes. It also generates a Python function that checks everything else: choices, URIs,
references, bindings of CodeableConcepts and invariants. A check returns True only for a resource without any issue.
False means that the walker must decide; rare features, such as extensions of primitives, always give False.

In generated code, a check has the parameters ``o`` (the Struct), ``c`` (the ContainedScope) and ``d`` (the number of
recursive structures, such as ``Extension``, that may still be nested).
"""

import keyword
import re
import sys
from collections.abc import Callable, Iterator
from threading import RLock
from types import ModuleType
from typing import Annotated, Any, ForwardRef, Literal, NamedTuple

import msgspec

from fhir_assets.fhir.validation import cached_checks, invariants
from fhir_assets.fhir.validation.bindings import allows_code, list_codes
from fhir_assets.fhir.validation.contained import ContainedScope
from fhir_assets.fhir.validation.decoder_patterns import (
    PATTERNS,
    RARE_ELEMENT_PATTERNS,
    TYPES_CHECKED_BY_DECODER,
    anchor_pattern,
)
from fhir_assets.fhir.validation.fast_invariants import (
    ABATED,
    SUFFICIENT_CONDITIONS,
    has_any,
    has_code,
    in_order,
    shares_coding,
    smaller,
)
from fhir_assets.fhir.validation.primitives import INTEGERS, MAX_INTEGER, MAX_STRING
from fhir_assets.fhir.validation.rules import PRIMITIVES, Element, Invariant, Rules, Structure

Check = Callable[[Any, ContainedScope, int], bool]


class CompiledType(NamedTuple):
    """The compiled form of a resource type: its decoder, its check, and whether it has the element ``contained``."""

    decode: Callable[[Any], Any]
    check: Check
    may_contain: bool


_TEXT = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STRING)]
_DECODED: dict[str, Any] = (
    {"boolean": bool, "decimal": float, "markdown": _TEXT, "string": _TEXT}
    | {name: Annotated[int, msgspec.Meta(ge=least, le=MAX_INTEGER)] for name, least in INTEGERS.items()}
    | {name: Annotated[str, msgspec.Meta(pattern=anchor_pattern(PATTERNS[name]))] for name in TYPES_CHECKED_BY_DECODER}
)
"""The types that the decoder checks completely. Control characters in strings are detected in the bytes instead."""

_ID = re.compile(PATTERNS["id"]).fullmatch
_INSTANT = re.compile(PATTERNS["instant"]).fullmatch
_DATE_TIME = re.compile(PATTERNS["dateTime"]).fullmatch
_MATCHED = {"id": "is_id", "instant": "is_instant", "dateTime": "is_date_time"}


class FastPathCompiler:
    """Compiles structures to Structs and check functions, each structure once.

    A process needs one instance; threads may share it.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._lock = RLock()
        self._compiled: dict[str, CompiledType] = {}
        self._namespace: dict[str, Any] = {
            "UCUM": "http://unitsofmeasure.org",
            "ABATED": ABATED,
            "is_id": _ID,
            "is_instant": _INSTANT,
            "is_date_time": _DATE_TIME,
            "is_valid_xhtml": cached_checks.is_valid_xhtml,
            **{function.__name__: function for function in (in_order, has_code, has_any, smaller, shares_coding)},
            **{f"seen_{kind}": seen for kind, seen in cached_checks.SEEN.items()},
            **{f"new_{kind}": new for kind, new in cached_checks.NEW.items()},
        }
        self._module = ModuleType(f"{__name__}.structs")
        sys.modules[self._module.__name__] = self._module  # msgspec resolves the names of recursive Structs here
        self._known: set[str] = set()

    def get_compiled(self, resource_type: str) -> CompiledType:
        """Return the compiled form of a resource type; it is compiled on first use."""
        compiled = self._compiled.get(resource_type)
        if compiled is None:
            with self._lock:
                self._compile(resource_type)
                name = python_name(resource_type)
                compiled = self._compiled[resource_type] = CompiledType(
                    msgspec.json.Decoder(getattr(self._module, name)).decode,
                    self._namespace[f"check_{name}"],
                    "contained" in self.rules.structure(resource_type).elements,
                )
        return compiled

    def _compile(self, name: str) -> None:
        new = [n for n in self._find_reachable(name) if n not in self._known]
        source = []
        for n in new:
            structure = self.rules.structure(n)
            setattr(self._module, python_name(n), self._build_struct(structure))
            source.append(CheckWriter(structure, self._namespace, self.rules.recursive).write())
        exec("\n".join(source), self._namespace)
        self._known.update(new)

    def _find_reachable(self, name: str) -> Iterator[str]:
        """Yield the names of the structure and of all structures that are reachable from its elements."""
        pending, seen = [name], {name}
        while pending:
            current = pending.pop()
            yield current
            for _, type_ in self.rules.structure(current).properties.values():
                if type_ not in PRIMITIVES and type_ != "Resource" and type_ not in seen:
                    seen.add(type_)
                    pending.append(type_)

    def _build_struct(self, structure: Structure) -> type[msgspec.Struct]:
        fields: list[Any] = []
        if structure.is_resource:
            fields.append(("resourceType", Literal[structure.name]))
        for name, (element, type_) in structure.properties.items():
            annotation = self._annotation(element, type_)
            if element.is_list:
                annotation = Annotated[list[annotation], msgspec.Meta(min_length=1)]  # type: ignore[valid-type]
            if element.required and not element.is_choice:
                fields.append((attribute_name(name), annotation))
            else:
                fields.append((attribute_name(name), annotation, None))
        return msgspec.defstruct(
            python_name(structure.name),
            fields,
            module=self._module.__name__,
            rename={attribute_name(name): name for name in structure.properties if attribute_name(name) != name},
            kw_only=True,
            omit_defaults=True,
            forbid_unknown_fields=True,
            gc=False,
            eq=False,
        )

    def _annotation(self, element: Element, type_: str) -> Any:
        if type_ == "code" and element.value_set is not None:
            codes = list_codes(element.value_set)
            return str if codes is None else Literal[tuple(sorted(codes))]
        if type_ == "Resource":
            return msgspec.Raw
        if type_ not in PRIMITIVES:
            return ForwardRef(python_name(type_))
        if is_rare(element, type_):
            return Annotated[str, msgspec.Meta(pattern=anchor_pattern(RARE_ELEMENT_PATTERNS[type_]))]
        return _DECODED.get(type_, str)


class CheckWriter:
    """Writes the Python source of the check of one structure; adds the objects that it uses to ``namespace``."""

    def __init__(self, structure: Structure, namespace: dict[str, Any], recursive: frozenset[str]) -> None:
        self.structure = structure
        self.namespace = namespace
        self.recursive = recursive
        self.lines: list[str] = []

    def write(self) -> str:
        """Return the source of the function ``check_<structure>``."""
        structure = self.structure
        is_reference = structure.name == "Reference"
        self.lines = [f"def check_{python_name(structure.name)}(o, c, d{', targets' if is_reference else ''}):"]
        if structure.name in self.recursive:
            self._line("if d < 0: return False")
        if not any(element.required and not element.is_choice for element in structure.elements.values()):
            names = [attribute_name(name) for name in structure.properties if name != "id"]
            self._line(f"if {' and '.join(f'o.{name} is None' for name in names)}: return False")
        for choice in structure.choices:
            self._line(f"n_{choice.name} = 0")
        for element in structure.elements.values():
            self._write_element(element)
        if is_reference:
            self._line("if not targets.allow(o, c): return False")
        for rule in structure.invariants:
            condition = self._invariant_condition(rule)
            if condition != "True":
                self._line(f"if not ({condition}): return False")
        self._line("return True")
        return "\n".join(self.lines)

    def _write_element(self, element: Element) -> None:
        for json_name, type_ in element.json_names().items():
            self._write_property(element, json_name, type_)
        if element.is_choice:
            self._line(f"if n_{element.name} > 1: return False")
            if element.required:
                self._line(f"if not n_{element.name}: return False")

    def _line(self, text: str, indent: int = 1) -> None:
        self.lines.append(" " * indent + text)

    def _write_property(self, element: Element, json_name: str, type_: str) -> None:
        tests = list(self._failure_tests(element, type_))
        if not tests and not element.is_choice:
            return
        value, indent = f"o.{attribute_name(json_name)}", 1
        if element.is_choice or not element.required:
            self._line(f"if {value} is not None:")
            indent = 2
        if element.is_choice:
            self._line(f"n_{element.name} += 1", indent)
        if tests and element.is_list:
            self._line(f"for v in {value}:", indent)
            indent += 1
        elif tests:
            self._line(f"v = {value}", indent)
        for test in tests:
            self._line(f"if {test}: return False", indent)

    def _failure_tests(self, element: Element, type_: str) -> Iterator[str]:
        """Yield conditions on ``v``, one value of the element; a value is not accepted if one of them is true."""
        suffix = f"{python_name(self.structure.name)}_{element.name}"
        if type_ in PRIMITIVES:
            yield from self._primitive_failure_tests(element, type_, suffix)
        elif type_ == "Resource":
            yield "not c.accepts(v)" if element.name == "contained" else "True"
        elif type_ == "Reference":
            targets = self.namespace[f"targets_{suffix}"] = cached_checks.get_reference_targets(element.targets)
            self.namespace[f"seen_{suffix}"] = targets.seen
            yield (
                f"(v.reference not in seen_{suffix} or v.type or v.identifier or v.extension or v.id) "
                f"and not check_Reference(v, c, d, targets_{suffix})"
            )
        else:
            depth = "d - 1" if type_ in self.recursive else "d"
            yield f"not check_{python_name(type_)}(v, c, {depth})"
            if element.value_set is not None:
                self.namespace[f"bound_{suffix}"] = cached_checks.build_binding_check(element.value_set)
                yield f"not bound_{suffix}(v)"
        for rule in element.invariants:
            condition = self._invariant_condition(rule)
            if condition != "True":
                yield f"not ({condition.replace('o.', 'v.')})"

    def _primitive_failure_tests(self, element: Element, type_: str, suffix: str) -> Iterator[str]:
        if type_ == "xhtml":
            yield "not is_valid_xhtml(v)"
        elif type_ == "code" and element.value_set is not None:
            value_set = element.value_set
            if list_codes(value_set) is None:
                self.namespace[f"bound_{suffix}"] = lambda code: allows_code(value_set, code)
                yield f"not bound_{suffix}(v)"
        elif type_ in _MATCHED and element.name != "versionId":
            yield f"{_MATCHED[type_]}(v) is None"
        elif type_ in cached_checks.KINDS and not is_rare(element, type_):
            kind = cached_checks.KINDS[type_]
            known = f"v not in seen_{kind} and " if kind in cached_checks.SEEN else ""
            yield f"{known}not new_{kind}(v)"

    def _invariant_condition(self, rule: Invariant) -> str:
        """Return a Python condition on ``o`` that implies the invariant."""
        if rule.key in invariants.SUBSUMED or rule.key in invariants.NOT_EVALUATED:
            return "True"
        condition = SUFFICIENT_CONDITIONS.get(rule.key, "False")
        for choice in self.structure.choices:
            condition = condition.replace("{" + choice.name + "}", f"n_{choice.name}")
        return condition


def is_rare(element: Element, type_: str) -> bool:
    """Return whether few resources have an element, so that the decoder checks it by ``RARE_ELEMENT_PATTERNS``."""
    return (
        element.name in {"implicitRules", "language"} and type_ in RARE_ELEMENT_PATTERNS and element.value_set is None
    )


def python_name(name: str) -> str:
    """Return the name of a structure as a Python identifier: ``Patient.contact`` -> ``Patient_contact``."""
    return name.replace(".", "_")


def attribute_name(name: str) -> str:
    """Return the attribute of the Struct for a JSON name. A Python keyword gets a trailing underscore."""
    return name + "_" if keyword.iskeyword(name) else name
