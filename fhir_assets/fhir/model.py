"""The types of FHIR R4: their elements, with types, cardinalities and JSON names.

A nested type (a backbone element) is named by its path: ``Patient.contact``. ``build_model`` compiles the data.
"""

import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Literal

import orjson

Kind = Literal["primitive", "complex", "resource", "nested"]


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a type.

    ``name`` is its name in FHIRPath (``value`` for ``value[x]``). ``max`` is None if the element repeats without limit.
    """

    name: str
    types: tuple[str, ...]
    min: int
    max: int | None
    choice: bool
    targets: tuple[str, ...]
    """The resource types that a Reference or a canonical may point to. Empty means any type."""

    @property
    def many(self) -> bool:
        """Whether the element is an array in JSON."""
        return self.max is None or self.max > 1

    def json_names(self) -> tuple[tuple[str, str], ...]:
        """Return the JSON names of the element, each with the element's type under that name."""
        if not self.choice:
            return ((self.name, self.types[0]),)
        return tuple((f"{self.name}{type_[0].upper()}{type_[1:]}", type_) for type_ in self.types)


@dataclass(frozen=True)
class Type:
    """A type with all of its elements, including inherited elements. ``regex`` is the pattern of a primitive.

    The elements are built on first use, because a command uses only a few of the 680 types.
    """

    name: str
    kind: Kind
    base: str | None
    abstract: bool
    regex: str | None
    definitions: Sequence[Sequence[Any]] = field(repr=False)
    """The elements as ``build_model`` writes them: path, types, minimum, maximum and, for references, targets."""

    @cached_property
    def elements(self) -> Mapping[str, Element]:
        """The elements by name in FHIRPath."""
        built = map(_build_element, self.definitions)
        return {element.name: element for element in built}

    @cached_property
    def json(self) -> Mapping[str, tuple[Element, str]]:
        """The element and its type by JSON name, such as ``valueQuantity``."""
        return {name: (element, type_) for element in self.elements.values() for name, type_ in element.json_names()}


def _build_element(definition: Sequence[Any]) -> Element:
    path, types, minimum, maximum, *targets = definition
    return Element(
        name=path.removesuffix("[x]"),
        types=tuple(types),
        min=minimum,
        max=None if maximum == "*" else int(maximum),
        choice=path.endswith("[x]"),
        targets=tuple(target for target in (targets[0] if targets else ()) if target != "Resource"),
    )


class Model:
    """The types of R4 by name."""

    def __init__(self, types: Mapping[str, Type]) -> None:
        self.types = types

    @cache  # noqa: B019  # There are one or two models, which live as long as the process.
    def ancestors(self, name: str) -> tuple[str, ...]:
        """Return the type, its base, and so on up to ``Element`` or ``Resource``."""
        chain: list[str] = []
        current: str | None = name
        while current is not None and current in self.types:
            chain.append(current)
            current = self.types[current].base
        return tuple(chain)

    def is_a(self, name: str, ancestor: str) -> bool:
        """Return whether the type is ``ancestor`` or is derived from it."""
        return ancestor in self.ancestors(name)

    def is_primitive(self, name: str) -> bool:
        """Return whether the type is a primitive, such as ``string`` or ``date``."""
        type_ = self.types.get(name)
        return type_ is not None and type_.kind == "primitive"

    def element(self, type_name: str, element: str) -> Element | None:
        """Return an element of a type; None if there is no such type or element."""
        type_ = self.types.get(type_name)
        return type_.elements.get(element) if type_ else None


UNKNOWN_TYPE = "Resource"
"""The abstract type of R4, used in place of a resource type that R4 does not define."""


def known_resource_type(name: str) -> str:
    """Return ``name`` if it is a resource type of R4, else UNKNOWN_TYPE.

    ``resourceType`` of received input may be any text, even patient data; the result is safe in logs and metrics.
    """
    type_ = r4().types.get(name)
    return name if type_ is not None and type_.kind == "resource" else UNKNOWN_TYPE


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean "birthDate"?`` for a misspelt name, or an empty text if no known name is similar."""
    folded = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return f'; did you mean "{folded[matches[0]]}"?' if matches else ""


@cache
def r4() -> Model:
    """Return the type model of R4 (4.0.1)."""
    with (files(__package__) / "model.json.gz").open("rb") as file:
        data = orjson.loads(gzip.decompress(file.read()))
    types = {
        name: Type(
            name,
            definition["kind"],
            definition["base"],
            definition["abstract"],
            definition.get("regex"),
            definition["elements"],
        )
        for name, definition in data["types"].items()
    }
    return Model(types)
