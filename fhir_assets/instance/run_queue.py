"""Deprecated location of ``fhir_assets.orchestration.instance.run_queue``."""

from fhir_assets.orchestration.instance.run_queue import RunQueue as RunQueue
