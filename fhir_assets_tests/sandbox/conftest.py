"""Sandbox servers that the tests call over HTTP."""

from collections.abc import Iterator

import pytest

from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.sandbox_observations import hourly_observations


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    """A server with 100 hourly Observations."""
    with SandboxServer(hourly_observations(100)) as server:
        yield server


@pytest.fixture
def empty() -> Iterator[SandboxServer]:
    """A server without resources."""
    with SandboxServer() as server:
        yield server
