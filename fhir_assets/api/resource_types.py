"""Resource types in paths: `Observation`, `observation`, or its plural `observations`."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import Path

from fhir_assets.api.problems import Problem
from fhir_assets.catalog import BY_KEY, BY_NAME, CATALOG

TypeName = Annotated[
    str,
    Path(
        description="A resource type: `Observation`, `observation`, or its plural `observations`",
        examples=["observations"],
        max_length=64,
    ),
]


def find_resource_type(loaded_types: Sequence[str], text: str) -> str:
    """Return the resource type that ``text`` names. Raises Problem (404) if it is not one of ``loaded_types``."""
    key = text.lower().replace("-", "_")
    by_lower_name = {name.lower(): name for name in BY_NAME}
    by_plural_key = {_plural(resource_type.key): resource_type.name for resource_type in CATALOG}
    by_plural_name = {_plural(lower): name for lower, name in by_lower_name.items()}
    by_key = {key: BY_KEY[key].name} if key in BY_KEY else {}
    name = by_lower_name.get(text.lower()) or by_plural_key.get(key) or by_key.get(key) or by_plural_name.get(key)
    if name is None or name not in loaded_types:
        raise Problem(404, "this resource type is not loaded here", more={"types": list(loaded_types)})
    return name


def _plural(key: str) -> str:
    if key.endswith("y"):
        return f"{key[:-1]}ies"
    return f"{key}es" if key.endswith("s") else f"{key}s"
