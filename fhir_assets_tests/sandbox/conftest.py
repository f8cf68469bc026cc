"""A sandbox server over a few small resources, over real HTTP."""

from collections.abc import Iterator

import pytest

from fhir_assets.sandbox.process import SandboxServer


def observation(number: int, last_updated: str, patient: str = "a", code: str = "8302-2") -> bytes:
    """An Observation with a decimal whose last digit is a zero."""
    return (
        b'{"resourceType":"Observation","id":"o%d","meta":{"versionId":"1","lastUpdated":"%b"},"status":"final",'
        b'"code":{"coding":[{"system":"http://loinc.org","code":"%b"}]},'
        b'"subject":{"reference":"Patient/%b"},"valueQuantity":{"value":1.10,"unit":"cm"}}'
    ) % (number, last_updated.encode(), code.encode(), patient.encode())


def hourly(count: int) -> list[bytes]:
    """Observations, one an hour from 2024-01-01 on."""
    return [observation(n, f"2024-01-{1 + n // 24:02}T{n % 24:02}:00:00.000Z") for n in range(count)]


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    """A server with 100 hourly Observations."""
    with SandboxServer(hourly(100)) as running:
        yield running


@pytest.fixture
def empty() -> Iterator[SandboxServer]:
    """A server without resources."""
    with SandboxServer() as running:
        yield running
