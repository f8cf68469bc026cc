"""Dagster's own daemon at work on a deployment."""

import os
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from fhir_assets.warehouse.database import normalise_url
from fhir_assets_tests.daemon import dagster_daemon
from fhir_assets_tests.e2e.conftest import Deployment

START = datetime(2024, 1, 1, tzinfo=UTC)
END = datetime(2024, 3, 31, tzinfo=UTC)
NEVER = "0 0 1 1 *"
"""A cron that does not come in a test's time."""


def environment(deployment: Deployment, **changed: str) -> dict[str, str]:
    """What the daemon, its code server and its runs find."""
    settings = deployment.settings
    return {
        **os.environ,
        "DAGSTER_HOME": str(settings.home / "dagster"),
        "DAGSTER_POSTGRES_URL": normalise_url(deployment.url, "psycopg2"),
        "DB_URL": deployment.url,
        "FHIR_ASSETS_HOME": str(settings.home),
        "FHIR_BASE_URL": settings.fhir_base_url,
        "FHIR_SOURCE": settings.fhir_source.value,
        "FHIR_RESOURCE_TYPES": ",".join(settings.fhir_resource_types),
        "FHIR_LAST_UPDATED_GTE": "2024-01-01",
        "FHIR_PARTITION": settings.fhir_partition.value,
        "FHIR_OVERLAP_SECONDS": "0",
        **changed,
    }


def daemon(deployment: Deployment, log: Path, **changed: str) -> AbstractContextManager[None]:
    """The daemon, as long as the context lasts."""
    return dagster_daemon(environment(deployment, **changed), deployment.settings.home, log)
