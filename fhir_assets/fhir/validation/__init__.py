"""Validation of FHIR R4 resources against the base definitions.

``Validator`` first tries the fast path (``fast_path``), which accepts resources without any issue. For all others the
walker (``walker``) finds every issue. Both use the rules of ``r4.json.gz``, which ``build_rules`` writes.
"""

from fhir_assets.fhir.validation.issues import Issue, build_operation_outcome
from fhir_assets.fhir.validation.validator import ValidationResult, Validator

__all__ = ["Issue", "ValidationResult", "Validator", "build_operation_outcome"]
