"""A process that calls a hostile FHIR server. A task is a road, the address and the kind of credentials."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from joserfc.jwk import ECKey

from fhir_assets.delivery.connector.server import FhirServer, PermanentFailure, TransientFailure
from fhir_assets.delivery.webhook import Webhook
from fhir_assets.fhir.auth.credentials import Basic, Bearer, Credentials
from fhir_assets.fhir.auth.smart import BackendServices
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.limits import ClientLimits
from fhir_assets.fhir.search.history import DeletionHistory
from fhir_assets.fhir.search.source import SearchSource
from fhir_assets.pipeline.fetch.bulk_source import BulkSource
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.ops.incidents import Incident
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.windows import Interval
from fhir_assets_tests.support.limited_process import answer_tasks

QUICK = ClientLimits(
    timeout=0.3,
    answer_seconds=0.3,
    answer_bytes=1 << 20,
    file_bytes=1 << 20,
    file_seconds=0.5,
    max_pages=9,
    max_files=9,
)
KEY = ECKey.generate_key("P-384")
RETRIER = Retrier(RetryPolicy(attempts=2), sleep=lambda seconds: None)


def _build_credentials(kind: str, url: str, limits: ClientLimits) -> Credentials:
    match kind:
        case "token":
            return Bearer("canary-token")
        case "password":
            return Basic("canary-user", "canary-password")
        case "smart":
            return BackendServices(url, "canary-client", key=KEY, retrier=RETRIER, limits=limits.answer)
    return Credentials()


def _search(client: FhirClient, task: dict[str, Any]) -> int:
    now = datetime.now(UTC)
    source = SearchSource(client, now=lambda: now)
    source.list_types()
    found = list(source.fetch(["Patient"], Interval(None, now)))
    return len(found) + len(list(DeletionHistory(client).fetch_since("Patient", now - timedelta(days=1))))


def _bulk(client: FhirClient, task: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = BulkSource(
            client,
            open_store(folder, NO_ENCRYPTION),
            lambda: connect(task["database"], cipher=NO_ENCRYPTION),
            time_limit=timedelta(0),
            reuse_within=timedelta(0),
            sleep=lambda seconds: None,
        )
        return len(list(source.fetch(["Patient"], Interval(None, datetime(2900, 1, 1, tzinfo=UTC)))))


def _target(client: FhirClient, task: dict[str, Any]) -> int:
    server = FhirServer(
        client.base_url, client.credentials, timeout=client.limits.timeout, connections=1, limits=client.limits.answer
    )
    body = b'{"resourceType":"Patient","id":"p"}'
    try:
        server.creates_conditionally("Patient")
        for method, path, content in (
            ("GET", "Patient/p", None),
            ("PUT", "Patient/p", body),
            ("DELETE", "Patient/p", None),
        ):
            with suppress(TransientFailure, PermanentFailure):
                server.call(method, path, body=content)
    finally:
        server.close()
    client.post(client.base_url, body, lambda answer: None, expect={200})
    return 1


def _webhook(client: FhirClient, task: dict[str, Any]) -> int:
    incident = Incident(1, "run", "load", ["2024-01-05"], {}, "run", datetime.now(UTC), None, None, None)
    webhook = Webhook(client.base_url, ui_url="", seconds=client.limits.answer.seconds, retrier=RETRIER)
    return webhook.deliver([incident], [])


ROADS: dict[str, Callable[[FhirClient, dict[str, Any]], int]] = {
    "search": _search,
    "bulk": _bulk,
    "target": _target,
    "webhook": _webhook,
}


def run(task: dict[str, Any]) -> None:
    """Run a task."""
    limits = QUICK if task.get("limits") is None else ClientLimits(**task["limits"])
    with FhirClient(
        task["url"],
        credentials=_build_credentials(task["credentials"], task["url"], limits),
        timeout=limits.timeout,
        retrier=RETRIER,
        limits=limits,
    ) as client:
        ROADS[task["road"]](client, task)


if __name__ == "__main__":
    answer_tasks(run)
