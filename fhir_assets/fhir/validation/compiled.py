"""The fast path: accepts what is surely good, and knows nothing of why the rest is not.

For each structure a ``msgspec.Struct`` is made, so that the decoder itself checks names, cardinality, JSON types,
integer ranges and codes, and a Python function for what the decoder cannot: formats, references, bindings of concepts,
invariants. False means "ask the walk"; it is also the answer for what is rare (extensions of primitives).
"""

import keyword
import sys
from collections.abc import Callable, Iterator
from threading import RLock
from types import ModuleType
from typing import Annotated, Any, Literal

import msgspec

from fhir_assets.fhir.validation import hot, memo
from fhir_assets.fhir.validation.bindings import allows_code, codes_of
from fhir_assets.fhir.validation.primitives import INTEGERS, MAX_INTEGER, MAX_STRING
from fhir_assets.fhir.validation.rules import PRIMITIVES, Element, Invariant, Rules, Structure
from fhir_assets.fhir.validation.scope import FastScope

Check = Callable[[Any, FastScope], bool]

_NATIVE: dict[str, Any] = {
    "boolean": bool,
    "decimal": float,
    "markdown": Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STRING)],
    "string": Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STRING)],
} | {name: Annotated[int, msgspec.Meta(ge=least, le=MAX_INTEGER)] for name, least in INTEGERS.items()}
"""What the decoder checks by itself (control characters in strings are looked for in the bytes)."""


class Compiler:
    """Makes Structs and check functions, each structure once. One a process; locked."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._lock = RLock()
        self._decoders: dict[str, msgspec.json.Decoder[Any]] = {}
        self._checks: dict[str, Check] = {}
        self._space: dict[str, Any] = {
            "UCUM": "http://unitsofmeasure.org",
            "Raw": msgspec.Raw,
            "ABATED": hot.ABATED,
            **{f.__name__: f for f in (hot.in_order, hot.has_code, hot.has_any, hot.smaller, hot.shares_coding)},
            **{f"seen_{kind}": seen for kind, seen in memo.SEEN.items()},
            **{f"new_{kind}": new for kind, new in memo.NEW.items()},
            "target_of": memo.target_of,
            "xhtml_is_good": memo.xhtml_is_good,
            "only_id": only_id,
        }
        self._module = ModuleType(f"{__name__}.structs")
        self._module.__dict__.update(Annotated=Annotated, Meta=msgspec.Meta, Raw=msgspec.Raw)
        sys.modules[self._module.__name__] = self._module  # where msgspec resolves the names of structs that recur
        self._known: set[str] = set()

    def compiled(self, resource_type: str) -> tuple[msgspec.json.Decoder[Any], Check]:
        """The decoder and the check of a resource type."""
        decoder = self._decoders.get(resource_type)
        if decoder is None:
            with self._lock:
                self._compile(resource_type)
                decoder = self._decoders[resource_type] = msgspec.json.Decoder(
                    getattr(self._module, python_name(resource_type))
                )
        return decoder, self._checks[resource_type]

    def _compile(self, name: str) -> None:
        new = [n for n in self._reachable(name) if n not in self._known]
        source = []
        for n in new:
            structure = self.rules.structure(n)
            setattr(self._module, python_name(n), self._struct(structure))
            source.append(Function(structure, self._space).source())
        exec("\n".join(source), self._space)
        self._known.update(new)
        if name not in self._checks:
            self._checks[name] = self._space[f"check_{python_name(name)}"]

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
            fields.append(("resourceType", Literal[structure.name]))  # type: ignore[valid-type]
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
            codes = codes_of(element.value_set)
            return str if codes is None else Literal[tuple(sorted(codes))]
        if type_ == "Resource":
            return msgspec.Raw
        return _NATIVE.get(type_, str) if type_ in PRIMITIVES else _Forward(python_name(type_))


def _Forward(name: str) -> Any:  # noqa: N802
    from typing import ForwardRef

    return ForwardRef(name)


class Function:
    """Writes the Python source of one structure's check."""

    def __init__(self, structure: Structure, space: dict[str, Any]) -> None:
        self.structure = structure
        self.space = space
        self.lines: list[str] = []

    def source(self) -> str:
        structure = self.structure
        name = python_name(structure.name)
        arguments = "o, c, targets" if structure.name == "Reference" else "o, c"
        self.lines = [f"def check_{name}({arguments}):"]
        for choice in structure.choices:
            self.lines.append(f" n_{choice.name} = 0")
        for element in structure.elements.values():
            for json_name, type_ in element.json_names().items():
                self._property(element, json_name, type_)
            if element.is_choice:
                self._line(f"if n_{element.name} > 1: return False")
                if element.required:
                    self._line(f"if not n_{element.name}: return False")
        if structure.name == "Reference":
            self._line("if (o.reference is not None or o.type is not None) and not target_of(o, c, targets): return False")
        for rule in structure.invariants:
            self._invariant(rule, "o")
        self._line("return True")
        return "\n".join(self.lines)

    def _line(self, text: str, indent: int = 1) -> None:
        self.lines.append(" " * indent + text)

    def _property(self, element: Element, json_name: str, type_: str) -> None:
        tests = list(self._tests(element, type_))
        if element.name == "id" and not self.structure.is_resource:
            tests.append("if only_id(o): return False")
        if not tests and not element.is_choice:
            return
        self._line(f"v = o.{attribute(json_name)}")
        self._line("if v is not None:")
        if element.is_choice:
            self._line(f"n_{element.name} += 1", 2)
        if element.is_list and tests:
            self._line("for v in v:", 2)
        for test in tests:
            self._line(test, 3 if element.is_list else 2)

    def _tests(self, element: Element, type_: str) -> Iterator[str]:
        """The statements that test ``v``, one value of the element."""
        if type_ in PRIMITIVES:
            yield from self._primitive_tests(element, type_)
        elif type_ == "Resource":
            yield f"if not c.{'contained' if element.name == 'contained' else 'inner'}(v): return False"
        elif type_ == "Reference":
            targets = f"targets_{python_name(self.structure.name)}_{element.name}"
            self.space[targets] = element.targets
            yield f"if not check_Reference(v, c, {targets}): return False"
        else:
            yield f"if not check_{python_name(type_)}(v, c): return False"
            if element.value_set is not None:
                concept = f"bound_{python_name(self.structure.name)}_{element.name}"
                self.space[concept] = memo.concept_test(element.value_set)
                yield f"if not {concept}(v): return False"
        for rule in element.invariants:
            form = self._form(rule)
            if form != "True":
                yield f"if not ({form.replace('o.', 'v.')}): return False"

    def _primitive_tests(self, element: Element, type_: str) -> Iterator[str]:
        if type_ == "xhtml":
            yield "if not xhtml_is_good(v): return False"
        elif type_ == "code" and element.value_set is not None:
            if codes_of(element.value_set) is None:
                grammar = f"bound_{python_name(self.structure.name)}_{element.name}"
                value_set = element.value_set
                self.space[grammar] = lambda code: allows_code(value_set, code)
                yield f"if not {grammar}(v): return False"
        elif type_ not in _NATIVE:
            kind = memo.KINDS[type_]
            if kind in memo.SEEN:
                yield f"if v not in seen_{kind} and not new_{kind}(v): return False"
            else:
                yield f"if not new_{kind}(v): return False"

    def _invariant(self, rule: Invariant, _focus: str) -> None:
        form = self._form(rule)
        if form != "True":
            self._line(f"if not ({form}): return False")

    def _form(self, rule: Invariant) -> str:
        if rule.key in hot.SUBSUMED:
            return "True"
        form = hot.FORMS.get(rule.key, "False")
        for choice in self.structure.choices:
            form = form.replace("{" + choice.name + "}", f"n_{choice.name}")
        return form


def python_name(name: str) -> str:
    """``Patient.contact`` -> ``Patient_contact``."""
    return name.replace(".", "_")


def attribute(name: str) -> str:
    """The Struct's attribute for a JSON name: keywords get an underscore."""
    return name + "_" if keyword.iskeyword(name) else name


def only_id(value: msgspec.Struct) -> bool:
    """Has the element an id and nothing else?"""
    return sum(1 for item in msgspec.structs.astuple(value) if item is not None) == 1
