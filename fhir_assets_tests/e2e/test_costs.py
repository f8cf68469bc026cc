"""What an empty window costs, counted and not timed: it must not grow with the number of types or statements."""

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


def test_an_empty_window_takes_a_handful_of_connections_whatever_the_number_of_types(
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
    (windows,) = ingestion.find_due(first=DAY.replace(day=2), last=DAY.replace(day=2))
    CONNECTION_CACHE.clear()
    made = 0
    connect = psycopg.Connection.connect.__func__  # type: ignore[attr-defined]

    def counted(cls: type[psycopg.Connection[Any]], *arguments: Any, **options: Any) -> psycopg.Connection[Any]:
        nonlocal made
        made += 1
        found: psycopg.Connection[Any] = connect(cls, *arguments, **options)
        return found

    monkeypatch.setattr(psycopg.Connection, "connect", classmethod(counted))
    assert ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="test").success
    assert 0 < made <= 12
