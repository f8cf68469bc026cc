"""The patients to whose compartment a resource belongs (https://hl7.org/fhir/R4/compartmentdefinition-patient.html)."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from fhir_assets.catalog import BY_NAME
from fhir_assets.fhir.references import Bases

UNKNOWN_PATIENT = "?"
"""The id used if a reference to a patient contains no id: a contained Patient, or a reference by identifier only."""

_match_patient = re.compile(r"(?:^|/)Patient/([^/?#|]+)").search


def find_patient_ids(resource: dict[str, Any], bases: Bases = None) -> tuple[str, ...]:
    """Return the ids of the patients whose compartment contains the resource, without duplicates.

    UNKNOWN_PATIENT stands for a patient of a server whose base URL is not in ``bases``, and for one that is not
    referred to by id. ``resource`` may be any JSON object with a resourceType: elements that do not conform to R4 are
    ignored.
    """
    paths = list_patient_paths(resource["resourceType"])
    if not paths:
        return ()
    if paths == OWN_ID:
        resource_id = resource.get("id")
        return (resource_id,) if isinstance(resource_id, str) else ()
    patient_ids: dict[str, None] = {}
    for path in paths:
        for reference in select_elements(resource, path):
            patient_id = find_patient_id(resource, reference, bases)
            if patient_id is not None:
                patient_ids[patient_id] = None
    return tuple(patient_ids)


OWN_ID = (("id",),)
"""The paths of Patient, which is in its own compartment."""


@cache
def list_patient_paths(resource_type: str) -> tuple[tuple[str, ...], ...]:
    """Return the paths of the elements that put a resource of a type into the compartment of a patient."""
    catalog_entry = BY_NAME.get(resource_type)
    return tuple(tuple(path.split(".")) for path in catalog_entry.patient) if catalog_entry else ()


def select_elements(node: Any, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the objects at a path. Every item of a list along the path is searched."""
    if isinstance(node, list):
        for item in node:
            yield from select_elements(item, path)
    elif isinstance(node, dict):
        if path:
            yield from select_elements(node.get(path[0]), path[1:])
        else:
            yield node


def find_patient_id(resource: Mapping[str, Any], reference: Mapping[str, Any], bases: Bases) -> str | None:
    """Return the id of the patient to whom a reference in a resource leads, or UNKNOWN_PATIENT.

    Return None if the reference refers to something else, or does not indicate that it refers to a patient.
    """
    target = reference.get("reference")
    if isinstance(target, str):
        if target.startswith("Patient/") and target.find("/", 8) < 0 and target.isascii():
            return target[8:]
        if match := _match_patient(target):
            is_own_server = match.start() == 0 or bases is None or target[: match.start()] in bases
            return match[1] if is_own_server else UNKNOWN_PATIENT
        if target.startswith(("Patient?", "urn:")) or "/Patient?" in target:
            return UNKNOWN_PATIENT if reference.get("type", "Patient") == "Patient" else None
        if target.startswith("#"):
            inner = find_contained(resource, target)
            if inner is not None:
                return UNKNOWN_PATIENT if inner.get("resourceType") == "Patient" else None
    return UNKNOWN_PATIENT if reference.get("type") == "Patient" else None


def find_contained(resource: Mapping[str, Any], target: str) -> dict[str, Any] | None:
    """Return the contained resource that a reference ``#id`` refers to, or None."""
    contained = resource.get("contained")
    for inner in contained if isinstance(contained, list) else ():
        if isinstance(inner, dict) and inner.get("id") == target[1:]:
            return inner
    return None
