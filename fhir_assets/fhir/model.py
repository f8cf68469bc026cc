"""The types of FHIR R4 as facts: which elements a type has, of which types, how many, under which JSON names.

A nested type (a backbone element) is named by its path: ``Patient.contact``. ``build_model`` makes the data.
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Literal

Kind = Literal["primitive", "complex", "resource", "nested"]


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a type. ``name`` is FHIRPath's (``value`` for ``value[x]``); ``max`` None means unbounded."""

    name: str
    types: tuple[str, ...]
    min: int
    max: int | None
    choice: bool
    targets: tuple[str, ...]
    """The resource types that a Reference or a canonical may point to; empty: any."""

    @property
    def many(self) -> bool:
        """True if JSON holds an array."""
        return self.max is None or self.max > 1

    def json_names(self) -> tuple[tuple[str, str], ...]:
        """Each name under which JSON may hold the element, with the type it then has."""
        if not self.choice:
            return ((self.name, self.types[0]),)
        return tuple((f"{self.name}{type_[0].upper()}{type_[1:]}", type_) for type_ in self.types)


@dataclass(frozen=True, slots=True)
class Type:
    """A type, with all its elements, inherited ones included. ``regex`` is a primitive's pattern."""

    name: str
    kind: Kind
    base: str | None
    abstract: bool
    elements: Mapping[str, Element]
    regex: str | None = None
    json: Mapping[str, tuple[Element, str]] = field(default_factory=dict)
    """By JSON name, ``valueQuantity``: the element and the type it has under this name."""


class Model:
    """All types by name."""

    def __init__(self, types: Mapping[str, Type]) -> None:
        self.types = types

    def ancestors(self, name: str) -> tuple[str, ...]:
        """The type itself, its base, and so on up to ``Element`` or ``Resource``."""
        chain: list[str] = []
        at: str | None = name
        while at is not None and at in self.types:
            chain.append(at)
            at = self.types[at].base
        return tuple(chain)

    def is_a(self, name: str, ancestor: str) -> bool:
        """True if the type is the other or is derived from it."""
        return ancestor in self.ancestors(name)

    def is_primitive(self, name: str) -> bool:
        """True for ``string``, ``date``, and so on: a type whose value JSON holds by itself."""
        type_ = self.types.get(name)
        return type_ is not None and type_.kind == "primitive"

    def element(self, type_name: str, element: str) -> Element | None:
        """The element of a type, None if the type has none of the name."""
        type_ = self.types.get(type_name)
        return type_.elements.get(element) if type_ else None


UNKNOWN_TYPE = "Resource"
"""What a resource counts as whose type R4 does not have: FHIR's abstract one."""


def known_resource_type(name: str) -> str:
    """A resourceType as it may be told and counted by: one of R4, else UNKNOWN_TYPE, since it may be anything."""
    type_ = r4().types.get(name)
    return name if type_ is not None and type_.kind == "resource" else UNKNOWN_TYPE


def suggest_name(name: str, known: Iterable[str]) -> str:
    """``; did you mean "birthDate"?`` for a misspelt name, or nothing if none of the known ones is near."""
    folded = {each.lower(): each for each in known}
    matches = get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return f'; did you mean "{folded[matches[0]]}"?' if matches else ""


@cache
def r4() -> Model:
    """The model of R4 4.0.1."""
    with (files(__package__) / "model.json.gz").open("rb") as file:
        data = json.loads(gzip.decompress(file.read()))
    types: dict[str, Type] = {}
    for name, facts in data["types"].items():
        elements: dict[str, Element] = {}
        json_names: dict[str, tuple[Element, str]] = {}
        for path, type_names, least, most, *targets in facts["elements"]:
            element = Element(
                name=path.removesuffix("[x]"),
                types=tuple(type_names),
                min=least,
                max=None if most == "*" else int(most),
                choice=path.endswith("[x]"),
                targets=tuple(t for t in (targets[0] if targets else ()) if t != "Resource"),
            )
            elements[element.name] = element
            json_names.update({json_name: (element, type_) for json_name, type_ in element.json_names()})
        types[name] = Type(
            name, facts["kind"], facts["base"], facts["abstract"], elements, facts.get("regex"), json_names
        )
    return Model(types)
