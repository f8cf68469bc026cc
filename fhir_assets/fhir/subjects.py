"""The subjects of resources, for consent: the patients of their compartments, and all other targets of references.

An unresolved reference to a patient is one that does not name a patient of this server by id: a ``urn:uuid`` without
its entry, an identifier, a contained Patient, a conditional reference, a URL of another server, or an unknown form.

Identifiers are compared as tokens, which are hashes. The tokens of a Patient (``list_tokens``) and those of a reference
(``_list_wanted_tokens``) intersect if the systems and the values are equal, or if the values are equal and one of the
two identifiers has no system.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from fhir_assets.fhir.compartment import (
    OWN_ID,
    UNKNOWN_PATIENT,
    find_contained,
    find_patient_id,
    list_patient_paths,
    select_elements,
)
from fhir_assets.fhir.identifier_tokens import HashIdentifier, build_token, list_tokens, read_identifier
from fhir_assets.fhir.references import Bases, split_reference

_IMPERSONAL_TYPES = frozenset(
    {"Organization", "OrganizationAffiliation", "Practitioner", "PractitionerRole", "Location", "HealthcareService"}
    | {"Endpoint", "InsurancePlan", "Medication", "MedicationKnowledge", "Substance", "Questionnaire", "ValueSet"}
    | {"CodeSystem", "ConceptMap", "StructureDefinition", "PlanDefinition", "ActivityDefinition", "Measure", "Library"}
    | {"SearchParameter", "OperationDefinition", "CapabilityStatement", "ResearchStudy", "EvidenceVariable"}
)
"""Resource types that are not about a patient. A reference to one of them does not identify a patient."""

_WANTED = "!"
"""The prefix of tokens in a Consent: the patient of the Consent may have these tokens."""

_NAMED = "~"
"""The prefix of tokens in a resource that names a Patient by an identifier: the Patient may have these tokens."""

REVISION = "1"
"""Increase this number whenever this module finds other subjects, so that stored subjects are determined again."""

_PARTICIPANTS = frozenset(
    {"performer", "asserter", "recorder", "author", "receiver", "actor", "member", "payor", "party", "policyHolder"}
)
"""The last elements of compartment paths that usually refer to staff and rarely to patients.

A reference in one of them that contains neither a type nor an id is not treated as a reference to a patient.
"""

_TYPE_AND_ID = re.compile(r"(?:^|/)([A-Z][A-Za-z]+)(?:/[^/?#|]+|\?)").search
_is_id = re.compile(r"[A-Za-z0-9\-.]{1,64}").fullmatch
_is_type = re.compile(r"[A-Z][A-Za-z]{1,63}").fullmatch
_PERSONS = (None, "Patient", "Person", "RelatedPerson")
_NESTED = (dict, list)


class Subjects(NamedTuple):
    """The subjects of a resource.

    ``patients`` are the ids of the patients of its compartments. An unresolved patient is represented by its possible
    tokens (``#<hash> #<hash>``) if identifiers name it, otherwise by UNKNOWN_PATIENT.

    ``mentions`` are the other targets of its references as ``Type/id``, without types that are not about a patient; the
    tokens of the persons it names (``#<hash>``); the tokens that Patients named by an identifier may have
    (``~#<hash>``); and, for a Consent, those that its patient may have (``!#<hash>``).
    """

    patients: tuple[str, ...]
    mentions: tuple[str, ...]


def find_subjects(resource: Mapping[str, Any], bases: Bases, hash_identifier: HashIdentifier) -> Subjects:
    """Return the subjects of a resource, including those of its contained resources.

    Elements that do not conform are ignored.
    """
    patients: dict[str, None] = {}
    mentions: dict[str, None] = {}
    resource_type = resource["resourceType"]
    paths = list_patient_paths(resource_type)
    if paths == OWN_ID:
        paths = ()
        if isinstance(resource.get("id"), str):
            patients[resource["id"]] = None
        mentions.update(dict.fromkeys(list_tokens(resource.get("identifier"), hash_identifier)))
    for path in paths:
        for reference in select_elements(resource, path):
            patient_id = _find_patient(resource, reference, path[-1] in _PARTICIPANTS, bases)
            wanted: tuple[str, ...] = ()
            if patient_id == UNKNOWN_PATIENT or (patient_id and resource_type == "Consent"):
                wanted = tuple(_list_wanted_tokens(resource, reference, hash_identifier))
            if patient_id == UNKNOWN_PATIENT and wanted:
                patient_id = " ".join(wanted)
            if patient_id:
                patients[patient_id] = None
            if resource_type == "Consent":
                mentions.update(dict.fromkeys(_WANTED + token for token in wanted))
    own = f"{resource_type}/{resource.get('id')}"
    for mention in _list_mentions(resource, bases, hash_identifier):
        if mention != own and not (mention.startswith("Patient/") and mention[8:] in patients):
            mentions[mention] = None
    return Subjects(tuple(patients), tuple(mentions))


def _find_patient(
    resource: Mapping[str, Any], reference: Mapping[str, Any], is_participant: bool, bases: Bases
) -> str | None:
    """Return the id of the patient that a reference refers to, UNKNOWN_PATIENT, or None if it refers to none."""
    patient_id = find_patient_id(resource, reference, bases)
    if patient_id is not None:
        return patient_id if _is_id(patient_id) else UNKNOWN_PATIENT
    if is_participant or reference.get("type", "Patient") != "Patient":
        return None
    target = reference.get("reference")
    if isinstance(target, str):
        if target.startswith("#"):
            return UNKNOWN_PATIENT if target != "#" and find_contained(resource, target) is None else None
        return None if _TYPE_AND_ID(target) else UNKNOWN_PATIENT
    return UNKNOWN_PATIENT


def _list_mentions(resource: Mapping[str, Any], bases: Bases, hash_identifier: HashIdentifier) -> Iterator[str]:
    """Yield the targets of the references in a resource and its contained resources, and the tokens of persons."""
    nodes: list[Any] = [resource]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += [item for item in node if isinstance(item, _NESTED)]
            continue
        nodes += [value for value in node.values() if isinstance(value, _NESTED)]
        if "reference" in node and isinstance(target := node["reference"], str):
            found = split_reference(target, bases)
            if found and found[0] not in _IMPERSONAL_TYPES and _is_type(found[0]) and _is_id(found[1]):
                yield f"{found[0]}/{found[1]}"
            elif "Patient?" in target:
                yield from _list_named(_read_conditional(target), hash_identifier)
        if "identifier" in node:
            yield from _list_persons(node, resource, hash_identifier)


def _list_persons(
    node: Mapping[str, Any], resource: Mapping[str, Any], hash_identifier: HashIdentifier
) -> Iterator[str]:
    """Yield the tokens of the person that a reference, or a contained Patient, names by identifiers."""
    identifier = node["identifier"]
    if isinstance(identifier, dict) and "resourceType" not in node and node.get("type") in _PERSONS:
        yield from _list_named([identifier], hash_identifier)
    elif node.get("resourceType") == "Patient" and node is not resource:
        yield from _list_named(identifier, hash_identifier)


def _list_wanted_tokens(
    resource: Mapping[str, Any], reference: Mapping[str, Any], hash_identifier: HashIdentifier
) -> Iterator[str]:
    """Yield the tokens of a reference. A Patient to which it may lead has at least one of them."""
    target = reference.get("reference")
    identifiers: list[Any] = [reference.get("identifier")]
    if isinstance(target, str) and target.startswith("#"):
        contained = find_contained(resource, target) or {}
        more = contained.get("identifier")
        identifiers += more if isinstance(more, list) else []
    elif isinstance(target, str) and "?" in target:
        identifiers += _read_conditional(target)
    yield from _list_search_tokens(identifiers, hash_identifier)


def _list_named(identifiers: Any, hash_identifier: HashIdentifier) -> Iterator[str]:
    """Yield the tokens of a person that a resource names by identifiers, and those that the person's Patient may
    have.
    """
    yield from list_tokens(identifiers, hash_identifier)
    for token in _list_search_tokens(identifiers if isinstance(identifiers, list) else (), hash_identifier):
        yield _NAMED + token


def _list_search_tokens(identifiers: Iterable[Any], hash_identifier: HashIdentifier) -> Iterator[str]:
    """Yield search tokens for identifiers. A Patient with one of the identifiers has at least one of the tokens."""
    for system, value in map(read_identifier, identifiers):
        if value and system:
            yield build_token(f"s:{system}|{value}", hash_identifier)
            yield build_token(f"n:{value}", hash_identifier)
        elif value:
            yield build_token(f"v:{value}", hash_identifier)


def _read_conditional(target: str) -> list[dict[str, str]]:
    """Return the identifiers in a conditional reference, such as ``Patient?identifier=system|value``."""
    found = []
    for name, text in parse_qsl(target.partition("?")[2]):
        if name.partition(":")[0] in ("identifier", "patient.identifier"):
            for token in text.split(","):
                system, _, value = token.rpartition("|")
                found.append({"system": system, "value": value})
    return found
