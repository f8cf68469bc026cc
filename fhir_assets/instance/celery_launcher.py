"""Deprecated location of ``fhir_assets.orchestration.instance.celery_launcher``."""

from fhir_assets.orchestration.instance.celery_launcher import Launcher as Launcher
