"""The fast path: accepts what is surely good, and knows nothing of why the rest is not.

For each structure a ``msgspec.Struct`` is made, so that the decoder itself checks names, cardinality, JSON types,
formats, integer ranges and codes, and Python functions for what the decoder cannot: choices, URIs, references,
bindings of concepts, invariants. False means "ask the walk"; it is also the answer for what is rare (extensions of
primitives).

A check takes the Struct ``o``, the scope ``c`` and how many structures that recur (``Extension``) may still be entered,
``d``: this bounds the nesting.
"""

import keyword
import re
import sys
from collections.abc import Callable, Iterator
from threading import RLock
from types import ModuleType
from typing import Annotated, Any, ForwardRef, Literal, NamedTuple

import msgspec

from fhir_assets.fhir.validation import cached_checks, fast_invariants, invariants
from fhir_assets.fhir.validation.bindings import allows_code, list_codes
from fhir_assets.fhir.validation.contained import ContainedScope
from fhir_assets.fhir.validation.decoder_patterns import PATTERNS, RARE, RARE_TYPES, anchored
from fhir_assets.fhir.validation.primitives import INTEGERS, MAX_INTEGER, MAX_STRING
from fhir_assets.fhir.validation.rules import PRIMITIVES, Element, Invariant, Rules, Structure

Check = Callable[[Any, ContainedScope, int], bool]


class CompiledType(NamedTuple):
    """A resource type: its decoder, its check, and whether it can contain resources."""

    decode: Callable[[Any], Any]
    check: Check
    may_contain: bool


_TEXT = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STRING)]
_DECODED: dict[str, Any] = (
    {"boolean": bool, "decimal": float, "markdown": _TEXT, "string": _TEXT}
    | {name: Annotated[int, msgspec.Meta(ge=least, le=MAX_INTEGER)] for name, least in INTEGERS.items()}
    | {name: Annotated[str, msgspec.Meta(pattern=anchored(PATTERNS[name]))] for name in RARE_TYPES}
)
"""What the decoder checks by itself (control characters in strings are looked for in the bytes)."""

_ID = re.compile(PATTERNS["id"]).fullmatch
_INSTANT = re.compile(PATTERNS["instant"]).fullmatch
_DATE_TIME = re.compile(PATTERNS["dateTime"]).fullmatch
_MATCHED = {"id": "is_id", "instant": "is_instant", "dateTime": "is_date_time"}


class FastPathCompiler:
    """Makes Structs and check functions, each structure once. One a process; locked."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._lock = RLock()
        self._made: dict[str, CompiledType] = {}
        self._space: dict[str, Any] = {
            "UCUM": "http://unitsofmeasure.org",
            "ABATED": fast_invariants.ABATED,
            "is_id": _ID,
            "is_instant": _INSTANT,
            "is_date_time": _DATE_TIME,
            "xhtml_is_good": cached_checks.xhtml_is_good,
            **{
                f.__name__: f
                for f in (
                    fast_invariants.in_order,
                    fast_invariants.has_code,
                    fast_invariants.has_any,
                    fast_invariants.smaller,
                    fast_invariants.shares_coding,
                )
            },
            **{f"seen_{kind}": seen for kind, seen in cached_checks.SEEN.items()},
            **{f"new_{kind}": new for kind, new in cached_checks.NEW.items()},
        }
        self._module = ModuleType(f"{__name__}.structs")
        sys.modules[self._module.__name__] = self._module  # where msgspec resolves the names of structs that recur
        self._known: set[str] = set()

    def compiled(self, resource_type: str) -> CompiledType:
        """The compiled form of a resource type, made on first use."""
        made = self._made.get(resource_type)
        if made is None:
            with self._lock:
                self._compile(resource_type)
                name = python_name(resource_type)
                made = self._made[resource_type] = CompiledType(
                    msgspec.json.Decoder(getattr(self._module, name)).decode,
                    self._space[f"check_{name}"],
                    "contained" in self.rules.structure(resource_type).elements,
                )
        return made

    def _compile(self, name: str) -> None:
        new = [n for n in self._reachable(name) if n not in self._known]
        source = []
        for n in new:
            structure = self.rules.structure(n)
            setattr(self._module, python_name(n), self._struct(structure))
            source.append(CheckWriter(structure, self._space, self.rules.recurring).source())
        exec("\n".join(source), self._space)
        self._known.update(new)

    def _reachable(self, name: str) -> Iterator[str]:
        waiting, seen = [name], {name}
        while waiting:
            current = waiting.pop()
            yield current
            for _, type_ in self.rules.structure(current).properties.values():
                if type_ not in PRIMITIVES and type_ != "Resource" and type_ not in seen:
                    seen.add(type_)
                    waiting.append(type_)

    def _struct(self, structure: Structure) -> type[msgspec.Struct]:
        fields: list[Any] = []
        if structure.is_resource:
            fields.append(("resourceType", Literal[structure.name]))
        for name, (element, type_) in structure.properties.items():
            annotation = self._annotation(element, type_)
            if element.is_list:
                annotation = Annotated[list[annotation], msgspec.Meta(min_length=1)]  # type: ignore[valid-type]
            if element.required and not element.is_choice:
                fields.append((attribute(name), annotation))
            else:
                fields.append((attribute(name), annotation, None))
        return msgspec.defstruct(
            python_name(structure.name),
            fields,
            module=self._module.__name__,
            rename={attribute(name): name for name in structure.properties if attribute(name) != name},
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
            return Annotated[str, msgspec.Meta(pattern=anchored(RARE[type_]))]
        return _DECODED.get(type_, str)


class CheckWriter:
    """Writes the Python source of one structure's check."""

    def __init__(self, structure: Structure, space: dict[str, Any], recurring: frozenset[str]) -> None:
        self.structure = structure
        self.space = space
        self.recurring = recurring
        self.lines: list[str] = []

    def source(self) -> str:
        structure = self.structure
        is_reference = structure.name == "Reference"
        self.lines = [f"def check_{python_name(structure.name)}(o, c, d{', targets' if is_reference else ''}):"]
        if structure.name in self.recurring:
            self._line("if d < 0: return False")
        if not any(element.required and not element.is_choice for element in structure.elements.values()):
            names = [attribute(name) for name in structure.properties if name != "id"]
            self._line(f"if {' and '.join(f'o.{name} is None' for name in names)}: return False")
        for choice in structure.choices:
            self._line(f"n_{choice.name} = 0")
        for element in structure.elements.values():
            for json_name, type_ in element.json_names().items():
                self._property(element, json_name, type_)
            if element.is_choice:
                self._line(f"if n_{element.name} > 1: return False")
                if element.required:
                    self._line(f"if not n_{element.name}: return False")
        if is_reference:
            self._line("if not targets.allow(o, c): return False")
        for rule in structure.invariants:
            form = self._form(rule)
            if form != "True":
                self._line(f"if not ({form}): return False")
        self._line("return True")
        return "\n".join(self.lines)

    def _line(self, text: str, indent: int = 1) -> None:
        self.lines.append(" " * indent + text)

    def _property(self, element: Element, json_name: str, type_: str) -> None:
        tests = list(self._tests(element, type_))
        if not tests and not element.is_choice:
            return
        value, indent = f"o.{attribute(json_name)}", 1
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

    def _tests(self, element: Element, type_: str) -> Iterator[str]:
        """What must not be true of ``v``, one value of the element."""
        location = f"{python_name(self.structure.name)}_{element.name}"
        if type_ in PRIMITIVES:
            yield from self._primitive_tests(element, type_, location)
        elif type_ == "Resource":
            yield "not c.contained(v)" if element.name == "contained" else "True"
        elif type_ == "Reference":
            targets = self.space[f"targets_{location}"] = cached_checks.targets(element.targets)
            self.space[f"seen_{location}"] = targets.seen
            yield (
                f"(v.reference not in seen_{location} or v.type or v.identifier or v.extension or v.id) "
                f"and not check_Reference(v, c, d, targets_{location})"
            )
        else:
            left = "d - 1" if type_ in self.recurring else "d"
            yield f"not check_{python_name(type_)}(v, c, {left})"
            if element.value_set is not None:
                self.space[f"bound_{location}"] = cached_checks.concept_test(element.value_set)
                yield f"not bound_{location}(v)"
        for rule in element.invariants:
            form = self._form(rule)
            if form != "True":
                yield f"not ({form.replace('o.', 'v.')})"

    def _primitive_tests(self, element: Element, type_: str, location: str) -> Iterator[str]:
        if type_ == "xhtml":
            yield "not xhtml_is_good(v)"
        elif type_ == "code" and element.value_set is not None:
            value_set = element.value_set
            if list_codes(value_set) is None:
                self.space[f"bound_{location}"] = lambda code: allows_code(value_set, code)
                yield f"not bound_{location}(v)"
        elif type_ in _MATCHED and element.name != "versionId":
            yield f"{_MATCHED[type_]}(v) is None"
        elif type_ in cached_checks.KINDS and not is_rare(element, type_):
            kind = cached_checks.KINDS[type_]
            known = f"v not in seen_{kind} and " if kind in cached_checks.SEEN else ""
            yield f"{known}not new_{kind}(v)"

    def _form(self, rule: Invariant) -> str:
        if rule.key in invariants.SUBSUMED or rule.key in invariants.NOT_EVALUATED:
            return "True"
        form = fast_invariants.FORMS.get(rule.key, "False")
        for choice in self.structure.choices:
            form = form.replace("{" + choice.name + "}", f"n_{choice.name}")
        return form


def is_rare(element: Element, type_: str) -> bool:
    """Is this an element that few resources have, so that the decoder should test it?"""
    return element.name in {"implicitRules", "language"} and type_ in RARE and element.value_set is None


def python_name(name: str) -> str:
    """``Patient.contact`` -> ``Patient_contact``."""
    return name.replace(".", "_")


def attribute(name: str) -> str:
    """The Struct's attribute for a JSON name: keywords get an underscore."""
    return name + "_" if keyword.iskeyword(name) else name
