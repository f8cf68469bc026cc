"""A full refresh removes what the server no longer has, after a look by id, and nothing else."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.record import build_record, read_header
from fhir_assets.pipeline.fetch import vanished
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, reply
from fhir_assets_tests.support.search_server import SearchServer, outcome, resource

pytestmark = pytest.mark.slow

MARCH = datetime(2024, 3, 5, tzinfo=UTC)
IDS = ["a", "b", "c", "d"]


@pytest.fixture
def server() -> Iterator[SearchServer]:
    """A server that does not remember deletions: it answers 404 for what it does not have."""
    with SearchServer([resource("Patient", id_) for id_ in IDS]) as server:
        yield server


def deployed(deploy: Deploy, server: SearchServer | SandboxServer, **settings: object) -> Deployment:
    values = {"fhir_resource_types": ("Patient",), "fhir_partition": "monthly", "fhir_deletes": "off", **settings}
    deployment = deploy(fhir_base_url=server.url, **values)
    assert ingest(deployment) == []
    return deployment


def ingest(deployment: Deployment, refresh: Refresh = Refresh.MISSING) -> list[str]:
    """Load, and return the descriptions of the failed checks."""
    outcomes = deployment.ingest(refresh=refresh)
    assert all(outcome.success for outcome in outcomes)
    return [text for outcome in outcomes for text in deployment.unreconciled(outcome)]


def present(deployment: Deployment) -> list[str]:
    rows = deployment.query("SELECT id FROM fhir.resource WHERE deleted_at IS NULL ORDER BY id")
    assert rows == deployment.query("SELECT id FROM fhir.patient ORDER BY id")
    return [id_ for (id_,) in rows]


def remove(server: SearchServer, *ids: str) -> None:
    server.resources = [item for item in server.resources if item["id"] not in ids]


def reads(server: SearchServer) -> list[str]:
    paths = [request.path.removeprefix("/fhir/") for request in server.requests]
    return sorted(path.removeprefix("Patient/") for path in paths if path.startswith("Patient/"))


def receive(deployment: Deployment, *ids: str) -> None:
    settings = deployment.settings
    receiver = Receiver(
        deployment.store, Warehouse(settings).connect, settings.window_scheme, settings.fhir_resource_types
    )
    bodies = [patient(id_, MARCH) for id_ in ids]
    receiver.receive([build_record(body, read_header(body), datetime.now(UTC)) for body in bodies], "landing:1")
    ingestion = deployment.ingestion()
    for waiting in ingestion.find_received():
        assert ingestion.load_received(waiting, triggered_by="test").success


@pytest.mark.parametrize("source", ["search", "bulk"])
def test_a_full_refresh_removes_what_the_server_deleted(deploy: Deploy, source: str) -> None:
    with SandboxServer([patient(id_, MARCH) for id_ in IDS]) as sandbox:
        deployment = deployed(deploy, sandbox, fhir_source=source, fhir_bulk_fresh_minutes=0)
        with FhirClient(sandbox.url) as client:
            client.send("DELETE", "Patient/a")
            client.send("DELETE", "Patient/c")
        assert ingest(deployment, Refresh.FULL) == []
        assert present(deployment) == ["b", "d"]
        with FhirClient(sandbox.url) as client:
            client.send("PUT", "Patient/a", b'{"resourceType":"Patient","id":"a"}')
        assert ingest(deployment, Refresh.FULL) == []
        assert present(deployment) == ["a", "b", "d"]


def test_a_server_that_does_not_know_deletions_is_asked_for_a_resource_that_it_has(
    deploy: Deploy, server: SearchServer
) -> None:
    deployment = deployed(deploy, server)
    remove(server, "b", "c")
    assert ingest(deployment, Refresh.FULL) == []
    assert present(deployment) == ["a", "d"]
    assert reads(server) == ["a", "b", "c"]
    assert ingest(deployment, Refresh.FULL) == []
    assert reads(server) == ["a", "b", "c"]


@pytest.mark.parametrize("invalid", ["a b", "a\0b"])
def test_an_invalid_id_does_not_end_a_full_refresh(deploy: Deploy, server: SearchServer, invalid: str) -> None:
    server.resources.append(resource("Patient", invalid))
    deployment = deployed(deploy, server)
    remove(server, "b")
    assert ingest(deployment, Refresh.FULL) == []
    assert present(deployment) == ["a", "c", "d"]
    assert sum(deployment.count_dead_letters().values()) == 1


def test_what_came_through_another_channel_stays(deploy: Deploy, server: SearchServer) -> None:
    deployment = deployed(deploy, server)
    receive(deployment, "landed", "a")
    remove(server, "a", "b")
    assert ingest(deployment, Refresh.FULL) == []
    assert present(deployment) == ["a", "c", "d", "landed"]
    assert "landed" not in reads(server)


def test_what_the_server_has_but_did_not_return_stays(deploy: Deploy, server: SearchServer) -> None:
    deployment = deployed(deploy, server)
    hidden = server.resources[0]

    def answer(request: ReceivedRequest, path: str) -> Reply | None:
        return reply(hidden) if path == "Patient/a" else None

    server.answer = answer
    remove(server, "a", "b")
    ingest(deployment, Refresh.FULL)
    assert present(deployment) == ["a", "c", "d"]


@pytest.mark.parametrize("status", [404, 403, 400])
def test_resources_stay_and_the_check_is_red_if_the_server_cannot_be_asked_by_id(
    deploy: Deploy, server: SearchServer, status: int
) -> None:
    deployment = deployed(deploy, server)
    server.answer = lambda request, path: outcome(status) if path.startswith("Patient/") else None
    remove(server, "a")
    (failure, *_) = ingest(deployment, Refresh.FULL)
    assert "kept in the tables" in failure
    assert present(deployment) == IDS
    server.answer = None
    assert ingest(deployment, Refresh.FULL) == []
    assert present(deployment) == ["b", "c", "d"]


def test_resources_stay_if_the_server_returns_nothing_at_all(deploy: Deploy, server: SearchServer) -> None:
    deployment = deployed(deploy, server)
    remove(server, *IDS)
    deployment.ingest(first=MARCH, refresh=Refresh.FULL)
    assert present(deployment) == IDS


def test_an_incremental_load_looks_up_nothing(deploy: Deploy, server: SearchServer) -> None:
    deployment = deployed(deploy, server)
    remove(server, "a")
    ingest(deployment)
    assert present(deployment) == IDS
    assert reads(server) == []


def test_more_resources_than_one_run_looks_up_are_a_red_check(
    deploy: Deploy, server: SearchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vanished, "MAX_READS", 1)
    deployment = deployed(deploy, server)
    remove(server, "a", "b")
    (failure, *_) = ingest(deployment, Refresh.FULL)
    assert "more than 1 Patient" in failure
    assert present(deployment) == ["b", "c", "d"]
    assert ingest(deployment, Refresh.FULL) == []
    assert present(deployment) == ["c", "d"]
