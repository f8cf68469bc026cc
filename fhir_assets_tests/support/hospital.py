"""A hospital's source tables with their outbox, a sandbox FHIR server, and connectors between the two."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from fhir_assets.delivery.connector import outbox
from fhir_assets.delivery.connector.setup import ConfiguredConnector, build_connector
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db.connections import Session, connect

MRN = "https://hospital.example.org/mrn"


@dataclass
class Hospital:
    """Schema ``health`` of a database, the FHIR server that receives its changes, and the connectors of a test."""

    url: str
    server: SandboxServer
    settings: Settings

    def connect(self) -> Session:
        return connect(self.url, cipher=NO_ENCRYPTION)

    def execute(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        with self.connect() as conn:
            cursor = conn.execute(statement, params)
            return cursor.fetchall() if cursor.description else []

    def admit(self, mrn: str | None, family: str = "Test", **columns: object) -> int:
        names = ["identifier_system", "identifier_value", "name_family", *columns]
        row = self.execute(
            f"INSERT INTO health.patient ({', '.join(names)}) VALUES ({', '.join(['%s'] * len(names))}) RETURNING id",
            MRN if mrn else None, mrn, family, *columns.values(),
        )  # fmt: skip
        return int(row[0][0])

    def connector(self, **settings: object) -> ConfiguredConnector:
        return build_connector(self.settings.model_copy(update=settings), self.connect)

    def deliver(self, **settings: object) -> None:
        """Run a connector until the outbox has no unprocessed changes."""
        with closing(self.connector(**settings)) as connector:
            connector.run(until_empty=True)

    @contextmanager
    def running(self, **settings: object) -> Iterator[ConfiguredConnector]:
        """Run a connector in a thread during the block."""
        with closing(self.connector(**settings)) as connector:
            thread = threading.Thread(target=connector.run)
            thread.start()
            try:
                yield connector
            finally:
                connector.stop()
                thread.join()

    def process(self, **environment: str) -> "subprocess.Popen[bytes]":
        """Start ``fhir-assets connector run`` in a process of its own. It logs to ``log``."""
        with self.log.open("ab") as log:  # Not a pipe, which nobody reads: a full one stops the connector.
            return subprocess.Popen(
                [sys.executable, "-c", "from fhir_assets.cli.connector import app; app()", "run"],
                env={
                    **os.environ,
                    "DB_URL": self.url,
                    "FHIR_BASE_URL": self.server.url,
                    "METRICS_PORT": "0",
                    "CONNECTOR_FIRST_WAIT_SECONDS": "0.05",
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stderr=log,
                cwd=self.settings.home,
            )

    @property
    def log(self) -> Path:
        """The file with the log lines of the processes of :meth:`process`."""
        return self.settings.home / "connector.log"

    def patients(self) -> dict[str, dict[str, Any]]:
        """Return the server's patients by MRN. Fail if two patients have the same MRN."""
        patients: dict[str, dict[str, Any]] = {}
        for version in list(self.server.store.type_store("Patient").latest.values()):
            if not version.deleted:
                resource = requests.get(f"{self.server.url}/Patient/{version.id}", timeout=10).json()
                mrn = next(i["value"] for i in resource["identifier"] if i["system"] == MRN)
                assert mrn not in patients, "two resources have the same identifier"
                patients[mrn] = resource
        return patients

    def families(self) -> dict[str, str]:
        """Return the family names of the server's patients by MRN."""
        return {mrn: resource["name"][0]["family"] for mrn, resource in self.patients().items()}

    def waiting(self) -> int:
        return int(self.execute("SELECT count(*) FROM health.fhir_outbox WHERE processed_at IS NULL")[0][0])

    def dead(self) -> list[tuple[str, str]]:
        return self.execute("SELECT record_id, reason FROM health.fhir_dlq WHERE status = 'open' ORDER BY id")


@pytest.fixture
def hospital(database: str, tmp_path: Path) -> Iterator[Hospital]:
    """Yield schema ``health`` with its triggers, and an empty FHIR server."""
    with connect(database) as conn:
        outbox.install(conn)
    with SandboxServer() as server:
        settings = load_settings(
            db_url=database,
            fhir_base_url=server.url,
            fhir_assets_home=tmp_path,
            connector_first_wait_seconds=0.05,
            connector_max_wait_seconds=0.5,
            connector_poll_seconds=0.2,
        )
        yield Hospital(database, server, settings)
