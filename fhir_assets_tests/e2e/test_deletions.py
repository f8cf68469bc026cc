"""Resources that the server deleted are removed from the tables and are not loaded again."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.sources.transition import SourceTransition
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.search_server import SearchServer, resource

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
IDS = [f"p{n}" for n in range(12)]


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([patient(identity, TODAY - timedelta(days=1)) for identity in IDS]) as server:
        yield server


def deploy_with_deletions(deploy: Deploy, server: SandboxServer, **settings: object) -> Deployment:
    values = {"fhir_deletes": "history", "fhir_resource_types": ("Patient",), "fhir_page_size": 5, **settings}
    return deploy(fhir_base_url=server.url, fhir_last_updated_gte=TODAY - timedelta(days=2), **values)


def ingest(deployment: Deployment, **options: object) -> None:
    outcomes = deployment.ingest(**options)  # type: ignore[arg-type]
    assert outcomes
    assert all(outcome.success for outcome in outcomes)
    assert [deployment.unreconciled(outcome) for outcome in outcomes] == [[]] * len(outcomes)


def delete(server: SandboxServer, *ids: str) -> None:
    with FhirClient(server.url) as client:
        for identity in ids:
            client.send("DELETE", f"Patient/{identity}")


def list_loaded_ids(deployment: Deployment) -> set[str]:
    """Return the ids of the Patients in the table of the view, which must equal those in fhir.resource."""
    rows = {identity for (identity,) in deployment.query("SELECT id FROM fhir.patient")}
    assert rows == {
        identity for (identity,) in deployment.query("SELECT id FROM fhir.resource WHERE deleted_at IS NULL")
    }
    return rows


def test_the_next_load_removes_resources_that_the_server_deleted(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy_with_deletions(deploy, server)
    ingest(deployment)
    assert list_loaded_ids(deployment) == set(IDS)
    delete(server, *IDS[:7])
    ingest(deployment)
    assert list_loaded_ids(deployment) == set(IDS[7:])
    ingest(deployment)
    assert list_loaded_ids(deployment) == set(IDS[7:])


def test_a_deleted_resource_stays_deleted_when_its_window_is_fetched_or_loaded_again(
    deploy: Deploy, server: SandboxServer
) -> None:
    deployment = deploy_with_deletions(deploy, server)
    ingest(deployment)
    delete(server, "p0")
    ingest(deployment)
    day = TODAY - timedelta(days=1)
    for refresh in (Refresh.WINDOW, Refresh.FULL):
        ingest(deployment, first=day, last=day, refresh=refresh)
    assert list_loaded_ids(deployment) == set(IDS[1:])


def test_a_deleted_resource_that_is_created_again_is_loaded(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy_with_deletions(deploy, server)
    ingest(deployment)
    delete(server, "p0")
    ingest(deployment)
    with FhirClient(server.url) as client:
        client.send("PUT", "Patient/p0", b'{"resourceType":"Patient","id":"p0"}')
    ingest(deployment)
    assert list_loaded_ids(deployment) == set(IDS)


def test_fhir_deletes_off_requests_no_history_and_switching_it_on_applies_all_deletions_since_the_first_load(
    deploy: Deploy, server: SandboxServer
) -> None:
    deployment = deploy_with_deletions(deploy, server, fhir_deletes="off")
    ingest(deployment)
    delete(server, "p0")
    ingest(deployment)
    assert list_loaded_ids(deployment) == set(IDS)
    assert not any("_history" in line for line in server.stats()["recent"])
    later = deploy_with_deletions(deploy, server)
    ingest(later)
    assert list_loaded_ids(later) == set(IDS[1:])


def test_deletions_are_applied_despite_transient_faults(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy_with_deletions(deploy, server, fhir_max_attempts=12)
    ingest(deployment)
    delete(server, *IDS[:11])
    server.set_faults(
        Fault(kind=FaultKind.ERROR, every=3, status=503),
        Fault(kind=FaultKind.TRUNCATE, every=4),
        Fault(kind=FaultKind.EXPIRE, every=3, times=2),
    )
    ingest(deployment)
    assert list_loaded_ids(deployment) == {"p11"}


def test_a_history_that_keeps_failing_fails_the_load_and_keeps_the_checkpoint(
    deploy: Deploy, server: SandboxServer
) -> None:
    deployment = deploy_with_deletions(deploy, server)
    ingest(deployment)
    before = deployment.query("SELECT applied_until FROM ops.deletion_checkpoints")
    delete(server, *IDS[:11])
    server.set_faults(Fault(kind=FaultKind.EXPIRE))
    (outcome,) = deployment.ingest()
    assert not outcome.success
    assert deployment.query("SELECT applied_until FROM ops.deletion_checkpoints") == before
    server.set_faults()
    ingest(deployment)
    assert list_loaded_ids(deployment) == {"p11"}


def test_a_history_that_is_refused_stops_no_load_and_is_red(deploy: Deploy, server: SandboxServer) -> None:
    deployment = deploy_with_deletions(deploy, server)
    server.set_faults(Fault(kind=FaultKind.ERROR, status=403, on=frozenset({RequestKind.HISTORY})))
    (outcome,) = deployment.ingest()
    assert outcome.success
    failures = deployment.unreconciled(outcome)
    assert failures
    assert all("Patient: the history cannot be read" in failure for failure in failures)
    assert list_loaded_ids(deployment) == set(IDS)
    assert deployment.query("SELECT applied_until FROM ops.deletion_checkpoints") == []


def test_a_server_without_a_history_is_a_warning(deploy: Deploy) -> None:
    with SearchServer([resource("Patient", "a")]) as server:
        deployment = deploy(
            fhir_base_url=server.url,
            fhir_resource_types=("Patient",),
            fhir_deletes="history",
            fhir_last_updated_gte=TODAY - timedelta(days=1),
        )
        outcomes = deployment.ingest()
        warnings = [check.metadata.get("warnings") for o in outcomes for check in deployment.checks(o.run_id)]
    assert "the server offers no history" in str(warnings)


def test_tables_rebuilt_from_the_store_contain_no_deleted_resources(
    deploy: Deploy, server: SandboxServer, empty_database: str
) -> None:
    ingest(before := deploy_with_deletions(deploy, server))
    delete(server, *IDS[:3])
    ingest(before)
    assert list_loaded_ids(before) == set(IDS[3:])
    after = deploy_with_deletions(deploy, server, url=empty_database, fhir_deletes="off")
    after.change_source(SourceTransition.carry_over)
    # The server refuses all reads, so that the tables can only come from the store.
    reads = frozenset({RequestKind.SEARCH, RequestKind.PAGE, RequestKind.HISTORY})
    server.set_faults(Fault(kind=FaultKind.ERROR, status=403, on=reads))
    ingestion = after.ingestion()
    yesterday = ingestion.due_loads.find(first=TODAY - timedelta(days=1), last=TODAY - timedelta(days=1))
    for windows in yesterday:
        outcome = ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="test")
        assert outcome.success
        assert after.unreconciled(outcome) == []
    assert list_loaded_ids(after) == set(IDS[3:])
    assert after.query("SELECT count(*) FROM fhir.resource WHERE deleted_at IS NOT NULL") == [(3,)]
