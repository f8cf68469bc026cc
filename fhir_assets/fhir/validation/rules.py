"""The rules of FHIR R4 (4.0.1), read from ``r4.json.gz``: the elements of each type and the constraints on them."""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import msgspec

RULES_FILE = Path(__file__).with_name("r4.json.gz")

PRIMITIVES = frozenset(
    {
        "base64Binary", "boolean", "canonical", "code", "date", "dateTime", "decimal", "id", "instant", "integer",
        "markdown", "oid", "positiveInt", "string", "time", "unsignedInt", "uri", "url", "uuid", "xhtml", "Element.id",
    }
)  # fmt: skip
"""The primitive types. ``Element.id`` is the type of the attribute ``id`` of elements, a string without white space."""


ALSO_TARGETS: dict[str, frozenset[str]] = {
    "DeviceMetric.parent": frozenset({"DeviceDefinition"}),
    "DeviceUseStatement.reasonReference": frozenset({"Procedure"}),
}
"""Target types that the definitions omit but examples in the specification use, by element."""


@dataclass(frozen=True, slots=True)
class Invariant:
    """A constraint of the definitions: its key, severity (``error`` or ``warning``) and FHIRPath expression."""

    key: str
    severity: str
    expression: str


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a structure.

    ``types`` are primitive types, complex types or paths of structures. ``targets`` are the resource types that a
    Reference may refer to (empty: any). ``value_set`` is the URL of the value set of a required binding.
    """

    name: str
    types: tuple[str, ...]
    required: bool
    is_list: bool
    is_choice: bool
    value_set: str | None
    targets: frozenset[str]
    invariants: tuple[Invariant, ...]

    def json_names(self) -> dict[str, str]:
        """Return the JSON property names of the element, with the type of each."""
        if not self.is_choice:
            return {self.name: self.types[0]}
        return {self.name + type_[0].upper() + type_[1:]: type_ for type_ in self.types}


@dataclass(frozen=True)
class Structure:
    """A resource type, a complex type, or an element that has child elements (``Patient.contact``)."""

    name: str
    kind: str
    base: str
    abstract: bool
    elements: Mapping[str, Element]
    invariants: tuple[Invariant, ...]

    @property
    def is_resource(self) -> bool:
        """True for a resource type."""
        return self.kind == "resource"

    @cached_property
    def properties(self) -> dict[str, tuple[Element, str]]:
        """The element and its type by JSON property name."""
        return {
            name: (element, type_) for element in self.elements.values() for name, type_ in element.json_names().items()
        }

    @cached_property
    def required(self) -> tuple[Element, ...]:
        """The elements with a minimum cardinality of 1."""
        return tuple(element for element in self.elements.values() if element.required)

    @cached_property
    def choices(self) -> tuple[Element, ...]:
        """The choice elements (``value[x]``)."""
        return tuple(element for element in self.elements.values() if element.is_choice)


class _Element(msgspec.Struct):
    t: list[str]
    n: int = 0
    l: int = 0  # noqa: E741
    c: int = 0
    v: str | None = None
    r: list[str] = []
    i: list[tuple[str, str, str]] = []


class _Structure(msgspec.Struct):
    kind: str
    elements: dict[str, _Element]
    base: str = ""
    abstract: bool = False
    invariants: list[tuple[str, str, str]] = []


class _File(msgspec.Struct, rename="camel"):
    version: str
    structures: dict[str, _Structure]
    value_sets: dict[str, dict[str, list[str]] | None]


class Rules:
    """All rules, decoded from the content of ``r4.json.gz``.

    ``digest`` is a hash of the content. ``value_sets`` maps the URL of a value set to the codes of each code system, or
    to None if the codes cannot be enumerated (see ``bindings.GRAMMARS``). ``resource_types`` are the names of all
    concrete resource types.
    """

    def __init__(self, content: bytes) -> None:
        file = msgspec.json.decode(gzip.decompress(content), type=_File)
        self._structures = file.structures
        self._decoded: dict[str, Structure] = {}
        self.fhir_version = file.version
        self.digest = hashlib.sha256(content).hexdigest()[:12]
        self.value_sets: dict[str, dict[str, frozenset[str]] | None] = {
            url: None if systems is None else {system: frozenset(codes) for system, codes in systems.items()}
            for url, systems in file.value_sets.items()
        }
        self.resource_types = frozenset(
            name for name, s in file.structures.items() if s.kind == "resource" and not s.abstract
        )

    @cached_property
    def recursive(self) -> frozenset[str]:
        """The structures that break all cycles: any unlimited nesting contains one of them.

        They are Extension, Identifier (through its assigner) and the targets of content references
        (``Questionnaire.item``).
        """
        content_references = {
            type_
            for name in self._structures
            for element in self.structure(name).elements.values()
            for type_ in element.types
            if "." in type_ and type_ in self._structures and type_ != f"{name}.{element.name}"
        }
        return frozenset(content_references | {"Extension", "Identifier"})

    def __contains__(self, name: str) -> bool:
        return name in self._structures

    def names(self) -> list[str]:
        """Return the names of all structures."""
        return list(self._structures)

    def structure(self, name: str) -> Structure:
        """Return the structure of a type, or of an element by its path. Raises KeyError if there is none."""
        structure = self._decoded.get(name)
        if structure is None:
            raw = self._structures[name]
            structure = self._decoded[name] = Structure(
                name=name,
                kind=raw.kind,
                base=raw.base,
                abstract=raw.abstract,
                elements={
                    key: Element(
                        name=key,
                        types=tuple(e.t),
                        required=bool(e.n),
                        is_list=bool(e.l),
                        is_choice=bool(e.c),
                        value_set=e.v,
                        targets=frozenset(e.r) | ALSO_TARGETS.get(f"{name}.{key}", frozenset()),
                        invariants=tuple(Invariant(*i) for i in e.i),
                    )
                    for key, e in raw.elements.items()
                },
                invariants=tuple(Invariant(*i) for i in raw.invariants),
            )
        return structure


@cache
def load_rules() -> Rules:
    """Return the rules of the package, which are read once in a process."""
    return Rules(RULES_FILE.read_bytes())
