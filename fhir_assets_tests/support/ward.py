"""A hospital that delivers to a server which allows several Patients with one identifier."""

import pytest

from fhir_assets_tests.support.hospital import Hospital
from fhir_assets_tests.support.patient_server import PatientServer


class Ward:
    """A hospital and the Patient server that it delivers to."""

    def __init__(self, hospital: Hospital, server: PatientServer) -> None:
        self.hospital = hospital
        self.server = server

    def deliver(self, **settings: object) -> None:
        self.hospital.deliver(fhir_base_url=self.server.url, **settings)

    def admit(self, mrn: str, family: str = "Ours") -> int:
        return self.hospital.admit(mrn, family)

    def execute(self, statement: str, *parameters: object) -> None:
        self.hospital.execute(statement, *parameters)

    def rename(self) -> None:
        """Change the family name of all rows to ``Changed``."""
        self.execute("UPDATE health.patient SET name_family = 'Changed'")

    def discharge(self) -> None:
        """Delete all rows."""
        self.execute("DELETE FROM health.patient")

    def forget_contents(self) -> None:
        """Leave of the deliveries what an earlier release recorded: the id and the identifier, not the content."""
        self.execute(
            "UPDATE health.fhir_delivered SET server = NULL, version_id = NULL, sent_hash = NULL, stored_hash = NULL"
        )

    def reasons(self) -> list[str]:
        """Return the reasons of the open dead letters."""
        return [reason for _, reason in self.hospital.dead()]


@pytest.fixture
def ward(hospital: Hospital, server: PatientServer) -> Ward:
    return Ward(hospital, server)
