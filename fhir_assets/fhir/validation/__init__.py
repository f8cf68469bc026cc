"""Validation of FHIR R4 resources: stricter than the libraries, and fast enough for every resource."""

from fhir_assets.fhir.validation.issues import Issue, build_operation_outcome
from fhir_assets.fhir.validation.validator import ValidationResult, Validator

__all__ = ["Issue", "ValidationResult", "Validator", "build_operation_outcome"]
