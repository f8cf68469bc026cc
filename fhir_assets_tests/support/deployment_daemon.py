"""Dagster's daemon for a deployment."""

import os
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from fhir_assets_tests.support.daemon import dagster_daemon
from fhir_assets_tests.support.deployment import Deployment

START = datetime(2024, 1, 1, tzinfo=UTC)
END = datetime(2024, 3, 31, tzinfo=UTC)
NEVER = "0 0 1 1 *"
"""A cron expression without a tick during a test."""


def environment(deployment: Deployment, **changed: str) -> dict[str, str]:
    """Return the environment of the daemon, its code server and its runs."""
    return {**os.environ, **deployment.environment(), **changed}


def daemon(deployment: Deployment, log: Path, **changed: str) -> AbstractContextManager[None]:
    """Run the daemon during the block."""
    return dagster_daemon(environment(deployment, **changed), deployment.settings.home, log)
