"""Validation of FHIR R4 resources: stricter than the libraries, and fast enough for every resource."""

from fhir_assets.fhir.validation.issues import Issue, operation_outcome
from fhir_assets.fhir.validation.validator import Validator, Verdict

__all__ = ["Issue", "Validator", "Verdict", "operation_outcome"]
