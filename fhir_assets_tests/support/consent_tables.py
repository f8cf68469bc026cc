"""The tables of a database under a consent policy."""

from datetime import datetime
from typing import Any

from fhir_assets.fhir.views import CompiledViews
from fhir_assets.pipeline.consent.step import ConsentResult, ConsentStep
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.warehouse.ops import encryption_secret
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.tables.loading import LoadCounts, Loader
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables
from fhir_assets_tests.support.consent_records import START, VIEWS, record


class Tables:
    """The tables of a database under a consent policy."""

    def __init__(self, url: str, gate: ConsentGate, cipher: Cipher | None = None) -> None:
        self.url = url
        self.gate = gate
        with connect(url) as conn:
            self.cipher = encryption_secret.unlock(conn, cipher or Cipher())
        with self.connect() as conn:
            ensure_tables(conn, VIEWS)

    def connect(self) -> Session:
        return connect(self.url, cipher=self.cipher)

    def load(self, *resources: dict[str, Any]) -> LoadCounts:
        total = LoadCounts()
        by_type: dict[str, list[dict[str, Any]]] = {}
        for resource in resources:
            by_type.setdefault(resource["resourceType"], []).append(resource)
        for name, of_type in by_type.items():
            views = [view for view in VIEWS if view.resource_type == name]
            rows = CompiledViews(views)
            with self.connect() as conn, conn.transaction():
                loader = Loader(conn, name, views, run_id="run", consent_gate=self.gate)
                assert not loader.add([(record(resource), rows.rows(resource)) for resource in of_type], "2024-01-01")
                counts = loader.finish()
                assert not loader.take_unloadable()
            total.inserted += counts.inserted
            total.updated += counts.updated
            total.superseded += counts.superseded
            total.withheld += counts.withheld
        return total

    def apply_consent(self, now: datetime = START) -> ConsentResult:
        return ConsentStep(self.connect, VIEWS, self.gate, run_id="consent", actor="test").run(now)

    def all(self, query: str) -> set[Any]:
        with self.connect() as conn:
            return {row[0] if len(row) == 1 else row for row in conn.execute(query.encode()).fetchall()}

    def shown(self) -> set[str]:
        """Return ``Type/id`` of the resources in fhir.resource, and check that every view has the same ones."""
        shown = self.all("SELECT resource_type || '/' || id FROM fhir.resource WHERE deleted_at IS NULL")
        for name in ("patient", "observation", "consent", "organization"):
            of_type = {key for key in shown if key.lower().startswith(f"{name}/")}
            assert {key.split("/")[1] for key in of_type} == self.all(f"SELECT _resource_key FROM fhir.{name}")
        assert self.all("SELECT _resource_key FROM fhir.patient_name") <= self.all(
            "SELECT _resource_key FROM fhir.patient"
        )
        return shown

    def withheld(self) -> set[str]:
        return self.all("SELECT resource_type || '/' || id FROM ops.withheld")
