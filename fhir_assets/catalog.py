"""The catalog: the FHIR resource types that the project loads, in load order. No other module lists them."""

import re
from dataclasses import dataclass


def snake_case(name: str) -> str:
    """Return a name in snake case, as in asset keys and table names.

    For example, ``MedicationRequest`` becomes ``medication_request``.
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@dataclass(frozen=True, slots=True)
class ResourceType:
    """A FHIR resource type.

    ``group`` is the group of its assets in Dagster. ``patient`` contains the paths of the elements whose references put
    a resource into the compartment of a patient (https://hl7.org/fhir/R4/compartmentdefinition-patient.html).
    """

    name: str
    group: str
    patient: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The type in snake case, as in ``raw/<key>``."""
        return snake_case(self.name)


CATALOG: tuple[ResourceType, ...] = (
    ResourceType("Organization", "administration"),
    ResourceType("Location", "administration"),
    ResourceType("Practitioner", "administration"),
    ResourceType("PractitionerRole", "administration"),
    ResourceType("Patient", "administration", ("id",)),
    ResourceType("Device", "administration", ("patient",)),
    ResourceType("Encounter", "administration", ("subject",)),
    ResourceType("Medication", "medications"),
    ResourceType("Condition", "clinical", ("subject", "asserter")),
    ResourceType("AllergyIntolerance", "clinical", ("patient", "recorder", "asserter")),
    ResourceType("Observation", "diagnostics", ("subject", "performer")),
    ResourceType("Procedure", "clinical", ("subject", "performer.actor")),
    ResourceType("Specimen", "diagnostics", ("subject",)),
    ResourceType("Immunization", "medications", ("patient",)),
    ResourceType("DiagnosticReport", "diagnostics", ("subject",)),
    ResourceType("DocumentReference", "clinical", ("subject", "author")),
    ResourceType("MedicationRequest", "medications", ("subject",)),
    ResourceType("MedicationDispense", "medications", ("subject", "receiver")),
    ResourceType("MedicationStatement", "medications", ("subject",)),
    ResourceType("MedicationAdministration", "medications", ("subject", "performer.actor")),
    ResourceType("CarePlan", "care_provision", ("subject",)),
    ResourceType("CareTeam", "care_provision", ("subject", "participant.member")),
    ResourceType("Goal", "care_provision", ("subject",)),
    ResourceType("ServiceRequest", "care_provision", ("subject", "performer")),
    ResourceType("Coverage", "financial", ("policyHolder", "subscriber", "beneficiary", "payor")),
    ResourceType("Claim", "financial", ("patient", "payee.party")),
    ResourceType("ExplanationOfBenefit", "financial", ("patient", "payee.party")),
    ResourceType("ImagingStudy", "diagnostics", ("subject",)),
    ResourceType("Consent", "security", ("patient",)),
    ResourceType("Provenance", "security", ("target",)),
)

BY_NAME: dict[str, ResourceType] = {t.name: t for t in CATALOG}
BY_KEY: dict[str, ResourceType] = {t.key: t for t in CATALOG}
LOAD_ORDER: dict[str, int] = {t.name: n for n, t in enumerate(CATALOG)}
