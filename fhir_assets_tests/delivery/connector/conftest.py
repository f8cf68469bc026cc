"""The hospital whose outbox the tests of the connector deliver, and a server of Patients."""

from collections.abc import Iterator

import pytest

from fhir_assets_tests.support.hospital import hospital as hospital
from fhir_assets_tests.support.patient_server import PatientServer
from fhir_assets_tests.support.ward import ward as ward


@pytest.fixture
def server() -> Iterator[PatientServer]:
    """A server that allows several Patients with one identifier."""
    with PatientServer() as running:
        yield running
