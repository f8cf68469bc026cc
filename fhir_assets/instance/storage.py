"""Deprecated location of ``fhir_assets.orchestration.instance.storage``."""

from fhir_assets.orchestration.instance.storage import PooledPostgresStorage as PooledPostgresStorage
