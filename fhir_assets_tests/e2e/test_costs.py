"""What an empty window costs, counted and not timed: it must not grow with the number of types or statements."""

from datetime import UTC, datetime
from pathlib import Path

from fhir_assets.pipeline.plan import Refresh
from fhir_assets.warehouse.database import connect
from fhir_assets.warehouse.idle import IDLE
from fhir_assets_tests.e2e.conftest import Deploy, Deployment
from fhir_assets_tests.e2e.content import patient

DAY = datetime(2024, 1, 1, tzinfo=UTC)
TYPES = "Patient,Encounter,Observation,Condition,Procedure,Location"


def sessions(deployment: Deployment) -> int:
    """How many connections were made to the database so far, by anybody, when ours have ended."""
    IDLE.clear()
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fhir_assets'"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )
    with connect(deployment.url, autocommit=True) as conn:
        while conn.execute(others).fetchone() != (0,):
            pass
        found = conn.execute("SELECT sessions FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert found is not None
    return int(found[0])


def test_an_empty_window_takes_a_handful_of_connections_whatever_the_number_of_types(
    deploy: Deploy, tmp_path: Path
) -> None:
    (tmp_path / "Patient.ndjson").write_bytes(patient("a", DAY) + b"\n")
    deployment = deploy(
        fhir_source="ndjson",
        fhir_base_url=str(tmp_path / "Patient.ndjson"),
        fhir_resource_types=TYPES,
        fhir_last_updated_gte="2023-12-01",
    )
    ingestion = deployment.ingestion()
    (windows,) = ingestion.due(first=DAY.replace(day=2), last=DAY.replace(day=2))
    before = sessions(deployment)
    assert ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="test").success
    assert sessions(deployment) - before <= 12
