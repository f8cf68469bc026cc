"""Which patients a resource belongs to: https://hl7.org/fhir/R4/compartmentdefinition-patient.html."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from fhir_assets.catalog import BY_NAME

UNKNOWN_PATIENT = "?"
"""Stands for a patient that is referred to, but not by an id: contained, or by an identifier only."""

_PATIENT = re.compile(r"(?:^|/)Patient/([^/?#|]+)").search


def find_patient_ids(resource: dict[str, Any]) -> tuple[str, ...]:
    """The ids of the patients whose compartment the resource is in, each once; none for what belongs to nobody.

    Takes any JSON object with a resourceType: an element that is not as R4 has it refers to nobody.
    """
    paths = _paths(resource["resourceType"])
    if not paths:
        return ()
    if paths == _ITSELF:
        identity = resource.get("id")
        return (identity,) if isinstance(identity, str) else ()
    found: dict[str, None] = {}
    for path in paths:
        for reference in _at(resource, path):
            patient = _patient(resource, reference)
            if patient is not None:
                found[patient] = None
    return tuple(found)


_ITSELF = (("id",),)


@cache
def _paths(resource_type: str) -> tuple[tuple[str, ...], ...]:
    known = BY_NAME.get(resource_type)
    return tuple(tuple(path.split(".")) for path in known.patient) if known else ()


def _at(node: Any, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The elements at a path, through lists."""
    if isinstance(node, list):
        for each in node:
            yield from _at(each, path)
    elif isinstance(node, dict):
        if path:
            yield from _at(node.get(path[0]), path[1:])
        else:
            yield node


def _patient(resource: dict[str, Any], reference: dict[str, Any]) -> str | None:
    target = reference.get("reference")
    if isinstance(target, str):
        if target.startswith("Patient/") and target.find("/", 8) < 0 and target.isascii():
            return target[8:]
        if found := _PATIENT(target):
            return found[1]
        if target.startswith("#"):
            contained = resource.get("contained")
            for each in contained if isinstance(contained, list) else ():
                if isinstance(each, dict) and each.get("id") == target[1:]:
                    return UNKNOWN_PATIENT if each.get("resourceType") == "Patient" else None
    return UNKNOWN_PATIENT if reference.get("type") == "Patient" else None
