"""The search parameters of the sandbox server, their types, and the values that they index.

A token is indexed as ``system|code``, as ``code`` and as ``system|`` (as ``|code`` if it has no system), a reference as
``Type/id``. See https://hl7.org/fhir/R4/search.html#token and #reference.
"""

from collections.abc import Callable, Iterator, Mapping

from fhir_assets.catalog import BY_NAME

Resource = Mapping[str, object]

_WITHOUT_IDENTIFIER = {"Provenance"}
_WITH_CODE = {
    "AllergyIntolerance",
    "Condition",
    "DiagnosticReport",
    "Medication",
    "MedicationAdministration",
    "MedicationDispense",
    "MedicationRequest",
    "MedicationStatement",
    "Observation",
    "Procedure",
    "ServiceRequest",
}
_WITHOUT_STATUS = {
    "AllergyIntolerance",
    "Condition",
    "Goal",
    "Organization",
    "Patient",
    "Practitioner",
    "PractitionerRole",
    "Provenance",
}
_PATIENT_ELEMENTS = ("subject", "patient", "beneficiary", "target")


def list_parameters(resource_type: str) -> tuple[str, ...]:
    """Return the search parameters of a type."""
    known = BY_NAME.get(resource_type)
    if known is None:
        return ()
    names = []
    if resource_type not in _WITHOUT_IDENTIFIER:
        names.append("identifier")
    if known.patient and resource_type != "Patient":
        names += ["patient", "subject"]
    if resource_type in _WITH_CODE:
        names.append("code")
    if resource_type not in _WITHOUT_STATUS and resource_type != "Medication":
        names.append("status")
    return tuple(names)


PARAMETER_TYPES = {
    "identifier": "token",
    "code": "token",
    "status": "token",
    "patient": "reference",
    "subject": "reference",
}


def _iterate_objects(value: object) -> Iterator[Mapping[str, object]]:
    if isinstance(value, Mapping):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _iterate_objects(item)


def _token(system: object, code: object) -> Iterator[str]:
    if isinstance(code, str):
        yield code
        yield f"{system}|{code}" if isinstance(system, str) else f"|{code}"
    if isinstance(system, str):
        yield f"{system}|"


def _identifier(resource: Resource) -> Iterator[str]:
    for identifier in _iterate_objects(resource.get("identifier")):
        yield from _token(identifier.get("system"), identifier.get("value"))


def _code(resource: Resource) -> Iterator[str]:
    for element in ("code", "medicationCodeableConcept"):
        for concept in _iterate_objects(resource.get(element)):
            for coding in _iterate_objects(concept.get("coding")):
                yield from _token(coding.get("system"), coding.get("code"))


def _status(resource: Resource) -> Iterator[str]:
    if isinstance(status := resource.get("status"), str):
        yield status


def _patient(resource: Resource) -> Iterator[str]:
    for element in _PATIENT_ELEMENTS:
        for reference in _iterate_objects(resource.get(element)):
            if isinstance(target := reference.get("reference"), str):
                yield "/".join(target.split("/_history/")[0].split("/")[-2:])


EXTRACTORS: Mapping[str, Callable[[Resource], Iterator[str]]] = {
    "identifier": _identifier,
    "code": _code,
    "status": _status,
    "patient": _patient,
    "subject": _patient,
}


def index_key(name: str, value: str) -> str:
    """Return the index key of a search value."""
    if PARAMETER_TYPES[name] == "reference":
        value = "/".join(value.split("/")[-2:])
        return value if "/" in value else f"Patient/{value}"
    return value
