"""Rows of a hospital's patients, the connector that delivers them, and the server that they are delivered to."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fhir_assets.delivery.connector import outbox
from fhir_assets.delivery.connector.setup import build_connector
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession, connect
from fhir_assets_tests.support.hospital import MRN
from fhir_assets_tests.support.patient_server import PatientServer

_SETTINGS = {"connector_first_wait_seconds": 0.02, "connector_max_wait_seconds": 0.1, "connector_poll_seconds": 0.05}


@dataclass
class SourceRows:
    """Schema ``health`` of the database ``url``, whose patients are delivered to ``server``."""

    url: str
    folder: Path
    server: PatientServer

    def install(self) -> None:
        """Create the schema with its outbox."""
        with connect(self.url) as conn:
            outbox.install(conn)

    def change(self, mrn: str, family: str | None) -> None:
        """Admit a patient, or change the family name of its row; with None, delete the row, if there is one."""
        with connect(self.url) as conn:
            if family is None:
                conn.execute("DELETE FROM health.patient WHERE identifier_value = %s", [mrn])
            elif not conn.execute(
                "UPDATE health.patient SET name_family = %s WHERE identifier_value = %s", [family, mrn]
            ).rowcount:
                conn.execute(
                    "INSERT INTO health.patient (identifier_system, identifier_value, name_family) VALUES (%s, %s, %s)",
                    [MRN, mrn, family],
                )
            self.commit(conn)

    def commit(self, conn: Connection) -> None:
        """End the transaction of a change; before it, nobody else sees the change."""
        conn.commit()

    def deliver(self, open_session: OpenSession) -> None:
        """Run a connector until no change waits."""
        settings = load_settings(
            db_url=self.url, fhir_base_url=self.server.url, fhir_assets_home=self.folder, **_SETTINGS
        )
        with closing(build_connector(settings, open_session, workers=1)) as connector:
            connector.run(until_empty=True)

    def find_delivered(self) -> dict[str, str]:
        """Return the family names on the server by MRN. Fail if two of its patients have one MRN."""
        identifiers = self.server.identifiers()
        assert len(set(identifiers.values())) == len(identifiers)
        return {identifiers[identity]: family for identity, family in self.server.families().items()}
