"""The cost of an empty window, counted in connections: it must not grow with the number of resource types."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.warehouse.postgres.db.connection_cache import CONNECTION_CACHE
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy

DAY = datetime(2024, 1, 1, tzinfo=UTC)
TYPES = "Patient,Encounter,Observation,Condition,Procedure,Location"


def test_an_empty_window_opens_few_connections_whatever_the_number_of_types(
    deploy: Deploy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Patient.ndjson").write_bytes(patient("a", DAY) + b"\n")
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(tmp_path / "Patient.ndjson"),
        fhir_resource_types=TYPES,
        fhir_last_updated_gte="2023-12-01",
    )
    ingestion = deployment.ingestion()
    (windows,) = ingestion.due_loads.find(first=DAY.replace(day=2), last=DAY.replace(day=2))
    CONNECTION_CACHE.clear()
    opened = 0
    connect = psycopg.Connection.connect.__func__  # type: ignore[attr-defined]

    def count_connection(
        cls: type[psycopg.Connection[Any]], *arguments: Any, **options: Any
    ) -> psycopg.Connection[Any]:
        nonlocal opened
        opened += 1
        connection: psycopg.Connection[Any] = connect(cls, *arguments, **options)
        return connection

    monkeypatch.setattr(psycopg.Connection, "connect", classmethod(count_connection))
    assert ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="test").success
    assert 0 < opened <= 12
