"""Deprecated location of ``fhir_assets.orchestration.instance``, kept for one release.

A deployment with its own ``dagster.yaml`` names these modules there. Replace ``fhir_assets.instance`` by
``fhir_assets.orchestration.instance``.
"""

import warnings

warnings.warn(
    "fhir_assets.instance has moved: name fhir_assets.orchestration.instance in dagster.yaml",
    DeprecationWarning,
    stacklevel=2,
)
