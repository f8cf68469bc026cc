"""Bulk exports under every fault of the sandbox server: complete data or a clear error, and recovery afterwards."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import pytest

from fhir_assets.errors import FhirAssetsError, NotFhir
from fhir_assets.fhir.auth.credentials import Basic, Bearer
from fhir_assets.fhir.bulk.client import BulkClient, ExportFailed, ExportGone, ExportPending
from fhir_assets.fhir.client.http import FhirClient
from fhir_assets.fhir.client.limits import ClientLimits
from fhir_assets.fhir.client.response import HttpStatusError
from fhir_assets.fhir.record import Record, RejectedInput
from fhir_assets.pipeline.fetch import bulk_download
from fhir_assets.pipeline.fetch.bulk_source import BulkSource
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.retries import Retrier, RetryPolicy
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.storage.store import Store, open_store
from fhir_assets.warehouse.postgres.db.connections import Connection, connect
from fhir_assets.windows import Interval
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.export_faults import EXPORT_FAULTS
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply

START = datetime(2024, 1, 1, tzinfo=UTC)
ALL_TIME = Interval(None, datetime(2024, 2, 1, tzinfo=UTC))
COUNT = 45
PAGE_FAULTS = {FaultKind.DUPLICATE, FaultKind.LOSE_PAGE}

QUICK_RETRIES = Retrier(RetryPolicy(attempts=4, first_wait=0.001, max_wait=0.002, max_retry_after=0.001))


def test_every_fault_of_the_sandbox_hits_exports_or_is_one_of_pages() -> None:
    assert {kind for kind, _ in EXPORT_FAULTS} == set(FaultKind) - PAGE_FAULTS


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), NO_ENCRYPTION)


@pytest.fixture
def server() -> Iterator[SandboxServer]:
    with SandboxServer([patient(f"p{n}", START) for n in range(COUNT)], export_file_resources=10) as server:
        yield server


def source(url: str, store: Store, database: str, **options: Any) -> BulkSource:
    def pause(seconds: float) -> None:
        pass

    client = FhirClient(url, retrier=QUICK_RETRIES, timeout=5)
    return BulkSource(client, store, lambda: connect(database, cipher=NO_ENCRYPTION), **{"sleep": pause, **options})


def ids(source: BulkSource) -> list[str]:
    identities = []
    for item in source.fetch(["Patient"], ALL_TIME):
        assert isinstance(item, Record), item
        identities.append(item.id)
    return sorted(identities)


ALL = sorted(f"p{n}" for n in range(COUNT))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "on"), EXPORT_FAULTS, ids=[f"{kind}-{on}" for kind, on in EXPORT_FAULTS])
def test_a_fault_ends_in_complete_data_or_a_clear_error_and_nothing_is_missing_afterwards(
    server: SandboxServer, store: Store, database: str, kind: FaultKind, on: RequestKind
) -> None:
    fault = Fault(kind=kind, on=frozenset({on}), retry_after=0, seconds=0.01)
    server.set_faults(fault)
    limit = timedelta(seconds=0.3)
    message = ""
    try:
        exported = ids(source(server.url, store, database, time_limit=limit))
    except FhirAssetsError as error:
        message = str(error)
    assert exported == ALL if not message else re.search(r"[a-z ]{20}", message)
    assert server.stats()["struck"][kind]
    server.set_faults(fault.model_copy(update={"times": 2, "every": 2}))
    for _ in range(3):  # the next run completes the export or requests a new one
        try:
            exported = ids(source(server.url, store, database, reuse_within=timedelta(0)))
        except NotFhir:
            continue
        assert exported == ALL
    server.set_faults()
    assert ids(source(server.url, store, database, reuse_within=timedelta(0))) == ALL


def test_a_run_completes_after_any_mixture_of_faults(server: SandboxServer, store: Store, database: str) -> None:
    server.set_faults(
        *(
            Fault(kind=kind, on=frozenset({on}), probability=0.12, retry_after=0, seconds=0.01, times=4)
            for kind, on in EXPORT_FAULTS
        ),
        seed=3,
    )
    messages = []
    for _ in range(40):
        try:
            exported = ids(source(server.url, store, database))
        except FhirAssetsError as error:
            messages.append(str(error))
        else:
            assert exported == ALL
            break
    else:
        pytest.fail("; ".join(messages))


@pytest.mark.parametrize("status", [404, 410])
def test_an_export_that_the_server_no_longer_has_is_requested_again(
    server: SandboxServer, store: Store, database: str, status: int
) -> None:
    server.set_faults(Fault(kind=FaultKind.EXPIRE, on=frozenset({RequestKind.POLL}), times=1, after=1, status=status))
    assert ids(source(server.url, store, database)) == ALL
    assert server.stats()["kick_offs"] == 2


def test_a_server_that_loses_every_export_is_an_error(server: SandboxServer, store: Store, database: str) -> None:
    server.set_faults(Fault(kind=FaultKind.EXPIRE, on=frozenset({RequestKind.POLL})))
    with pytest.raises(ExportGone, match="no longer has the export"):
        ids(source(server.url, store, database))
    assert server.stats()["kick_offs"] == 3


def test_an_export_that_is_never_ready_fails_and_the_next_run_requests_a_new_one(
    store: Store, database: str, conn: Connection
) -> None:
    clock = [START]

    def sleep(seconds: float) -> None:
        clock[0] += timedelta(hours=10)

    with SandboxServer([patient("p0", START)], export_polls=30) as server:
        slow = source(server.url, store, database, now=lambda: clock[0], sleep=sleep, time_limit=timedelta(days=2))
        with pytest.raises(ExportFailed, match=r"ready for 2 days \(see the time limit of an export\)"):
            ids(slow)
        assert conn.execute("SELECT status FROM ops.bulk_exports").fetchall() == [("failed",)]
        assert server.stats()["requests"]["delete"] == 1
    with SandboxServer([patient("p0", START)]) as server:
        assert ids(source(server.url, store, database)) == ["p0"]


def test_a_date_in_retry_after_is_waited_for(server: SandboxServer, store: Store, database: str) -> None:
    waits: list[float] = []
    on_poll = frozenset({RequestKind.POLL})
    server.set_faults(Fault(kind=FaultKind.THROTTLE, on=on_poll, times=2, retry_after=120, retry_after_date=True))
    assert ids(source(server.url, store, database, sleep=waits.append)) == ALL
    assert [round(wait, -1) for wait in waits[:2]] == [120, 120]
    assert waits[2:] == [0.1, 0.1], "the shortest wait, for a server that answers 0 seconds"


@pytest.mark.parametrize("wait", ["-5", "nan", "99999999999999999999", "Fri, 31 Dec 9999 23:59:59 GMT", "soon", "1e9"])
def test_an_absurd_retry_after_is_waited_for_no_longer_than_ten_minutes(store: Store, database: str, wait: str) -> None:
    waits: list[float] = []
    answers = iter([Reply(status=202, headers={"Retry-After": wait}), Reply(status=429, headers={"Retry-After": wait})])
    with scripted(MANIFEST, poll=lambda: next(answers, reply(MANIFEST))) as server:
        assert ids(source(server.url, store, database, sleep=waits.append)) == []
    assert len(waits) == 2
    assert all(0.1 <= seconds <= 600 for seconds in waits)


def test_two_processes_at_once_share_one_export(server: SandboxServer, store: Store, database: str) -> None:
    interval = Interval(None, datetime.now(UTC))

    def choose(_: int) -> datetime:
        return source(server.url, store, database).complete_until({"Patient": interval})["Patient"]

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(choose, range(3)))) == 1
    assert server.stats()["kick_offs"] == 1


@pytest.mark.parametrize("needs_token", [True, False, None])
def test_files_of_another_origin_are_read_and_a_password_stays_at_the_server(
    store: Store, database: str, needs_token: bool | None
) -> None:
    with ScriptedServer(lambda _: Reply(patient("p", START) + b"\n")) as files:
        manifest = {**MANIFEST, "output": [{"type": "Patient", "url": f"{files.origin}/p.ndjson?signed=1"}]}
        if needs_token is None:
            del manifest["requiresAccessToken"]
        else:
            manifest["requiresAccessToken"] = needs_token
        with scripted(manifest) as server:
            client = FhirClient(server.url, credentials=Basic("user", "secret"), retrier=QUICK_RETRIES)
            bulk_source = BulkSource(client, store, lambda: connect(database, cipher=NO_ENCRYPTION))
            assert ids(bulk_source) == ["p"]
            assert all("Authorization" in request.headers for request in server.requests)
        assert ["Authorization" in request.headers for request in files.requests] == [False]


def test_a_token_is_sent_to_another_origin_only_if_the_manifest_requires_it(store: Store, database: str) -> None:
    with ScriptedServer(lambda _: Reply(patient("p", START) + b"\n")) as files:
        manifest = {**MANIFEST, "output": [{"type": "Patient", "url": f"{files.origin}/p.ndjson"}]}
        del manifest["requiresAccessToken"]
        with scripted(manifest) as server:
            client = FhirClient(server.url, credentials=Bearer("secret"), retrier=QUICK_RETRIES)
            bulk_source = BulkSource(client, store, lambda: connect(database, cipher=NO_ENCRYPTION))
            assert ids(bulk_source) == ["p"]
        manifest["requiresAccessToken"] = True
        with scripted(manifest) as server:
            client = FhirClient(server.url, credentials=Bearer("secret"), retrier=QUICK_RETRIES)
            bulk_source = BulkSource(client, store, lambda: connect(database, cipher=NO_ENCRYPTION))
            with pytest.raises(NotFhir, match="without TLS"):
                ids(bulk_source)
        assert ["Authorization" in request.headers for request in files.requests] == [False]


MANIFEST: dict[str, Any] = {
    "transactionTime": datetime.now(UTC).isoformat(),
    "requiresAccessToken": False,
    "output": [],
    "error": [],
}


def scripted(
    manifest: object,
    file: Reply | Callable[[], Reply] | None = None,
    *,
    poll: Reply | Callable[[], Reply] | None = None,
) -> ScriptedServer:
    """Return a server with one export. ``file`` answers the requests for its files."""

    def answer(request: ReceivedRequest) -> Reply:
        if request.path.endswith("$export"):
            return Reply(status=202, headers={"Content-Location": "/fhir/status"})
        if request.path == "/fhir/status":
            return (poll() if callable(poll) else poll) or reply(manifest)
        return (file() if callable(file) else file) or Reply(status=404)

    return ScriptedServer(answer)


def test_a_file_that_comes_in_another_order_after_it_broke_off_is_read_anew_without_duplicates(
    store: Store, database: str
) -> None:
    lines = [patient(f"p{n:04}", START) for n in range(6000)]
    answers = iter(
        [
            Reply(b"\n".join(lines) + b"\n", cut=400_000),
            Reply(b"\n".join(lines[3000:] + lines[:3000]) + b"\n"),
            Reply(b"\n".join(lines[3000:] + lines[:3000]) + b"\n"),
        ]
    )
    manifest = {**MANIFEST, "output": [{"type": "Patient", "url": "/file", "count": 6000}]}
    with scripted(manifest, lambda: next(answers)) as server:
        assert ids(source(server.url, store, database)) == [f"p{n:04}" for n in range(6000)]
    assert next(answers, None) is None, "the file was cut, resumed and read anew"


@pytest.mark.parametrize(
    "wrong",
    [
        {"transactionTime": "yesterday"},
        {"output": [{"type": "Patient"}]},
        {"output": [{"type": "Patient", "url": "file:///etc/passwd"}]},
        {"output": [{"type": "Patient", "url": "/fhir/1", "count": "two"}]},
        {"deleted": {"url": "/fhir/1"}},
    ],
    ids=["time", "no-url", "no-http", "no-count", "no-list"],
)
def test_an_invalid_manifest_is_an_error_and_the_export_is_failed(
    store: Store, database: str, conn: Connection, wrong: dict[str, Any]
) -> None:
    with scripted({**MANIFEST, **wrong}) as server, pytest.raises(NotFhir, match="not a Bulk Data manifest"):
        ids(source(server.url, store, database))
    assert conn.execute("SELECT status FROM ops.bulk_exports").fetchall() == [("failed",)]


def test_an_export_that_fails_on_the_server_is_failed(store: Store, database: str, conn: Connection) -> None:
    outcome = {"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": "too-costly"}]}
    with (
        scripted(MANIFEST, poll=reply(outcome, 500)) as server,
        pytest.raises(ExportFailed, match=r"failed \(too-costly\)"),
    ):
        ids(source(server.url, store, database))
    assert conn.execute("SELECT status FROM ops.bulk_exports").fetchall() == [("failed",)]


def test_an_export_whose_poll_is_forbidden_is_kept(store: Store, database: str, conn: Connection) -> None:
    with scripted(MANIFEST, poll=Reply(status=403)) as server, pytest.raises(HttpStatusError, match="403"):
        ids(source(server.url, store, database))
    assert conn.execute("SELECT status FROM ops.bulk_exports").fetchall() == [("waiting",)]


def test_control_characters_in_the_progress_of_a_server_are_escaped() -> None:
    headers = {"X-Progress": "50%\x1b[2J\x9b", "Retry-After": "0"}
    with ScriptedServer([Reply(status=202, headers=headers)]) as server:
        status = BulkClient(FhirClient(server.url, retrier=QUICK_RETRIES)).poll(f"{server.url}/status", 0)
    assert isinstance(status, ExportPending)
    assert status.progress == r"50%\u001b[2J\u009b"


def test_the_progress_of_the_server_and_of_the_download_is_reported(
    server: SandboxServer, store: Store, database: str
) -> None:
    reports: list[str] = []
    ids(source(server.url, store, database, on_progress=reports.append))
    texts = [line.partition(": ")[2] for line in reports]
    assert texts[0] == "the server has accepted the request"
    assert texts[1:3] == ["33 % done", "66 % done"]
    assert texts[-1].startswith(f"downloaded 5 of 5 files, {COUNT} resources, 0.0 MiB")


def test_a_long_download_is_reported_at_intervals_and_not_for_each_file(
    store: Store, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_download, "PROGRESS_INTERVAL", 0.05)
    reports: list[str] = []
    slow = Fault(kind=FaultKind.SLOW, on=frozenset({RequestKind.FILE}), seconds=0.02)
    with SandboxServer([patient(f"p{n}", START) for n in range(60)], export_file_resources=1, faults=(slow,)) as server:
        ids(source(server.url, store, database, on_progress=reports.append, connections=1))
    downloads = [line for line in reports if "downloaded" in line]
    assert 2 <= len(downloads) < 40
    assert " of 60 files" in downloads[0]
    assert "downloaded 60 of 60 files, 60 resources" in downloads[-1]


def test_small_files_share_a_call_slot(store: Store, database: str) -> None:
    slots = []

    @contextmanager
    def call_slot() -> Iterator[None]:
        slots.append(1)
        yield

    with SandboxServer([patient(f"p{n}", START) for n in range(100)], export_file_resources=1) as server:
        client = FhirClient(server.url, call_slot=call_slot)
        exported = ids(
            BulkSource(
                client, store, lambda: connect(database, cipher=NO_ENCRYPTION), connections=1, sleep=lambda _: None
            )
        )
    assert len(exported) == 100
    assert len(slots) < 10


def test_many_small_files_become_one_part(store: Store, database: str, conn: Connection) -> None:
    bodies = [patient(f"p{n}", START) for n in range(600)]
    with SandboxServer(bodies, export_file_resources=2) as server:
        assert len(ids(source(server.url, store, database))) == 600
        assert server.stats()["requests"]["file"] == 300
    assert conn.execute("SELECT count(*), sum(rows) FROM ops.bulk_parts").fetchone() == (1, 600)


def test_deletions_are_applied_by_versioned_and_absolute_urls_and_an_unreadable_one_is_a_dead_letter(
    store: Store, database: str, conn: Connection
) -> None:
    urls = ["https://h.example/fhir/Patient/a/_history/2", "Patient/b", "Patient?name=Mustermann"]
    bundles = [{"resourceType": "Bundle", "entry": [{"request": {"method": "DELETE", "url": url}}]} for url in urls]
    lines = b"".join(orjson.dumps(bundle) + b"\n" for bundle in bundles)
    manifest = {**MANIFEST, "deleted": [{"type": "Bundle", "url": "/fhir/deleted"}]}
    with scripted(manifest, Reply(lines)) as server:
        assert ids(source(server.url, store, database)) == []
    deleted = conn.execute("SELECT id, version_id FROM fhir.resource WHERE deleted_at IS NOT NULL ORDER BY id")
    assert deleted.fetchall() == [("a", "2"), ("b", None)]
    letters = conn.execute("SELECT stage, rule, message FROM ops.dead_letters").fetchall()
    ((stage, rule, message),) = letters
    assert (stage, rule) == ("export", "export-deletion")
    assert "Mustermann" not in message


def test_a_line_that_is_longer_than_the_limit_becomes_a_dead_letter_and_the_others_are_read(
    store: Store, database: str
) -> None:
    lines = [patient("a", START), patient("b", START, text="x" * 5000), patient("c", START)]
    manifest = {**MANIFEST, "output": [{"type": "Patient", "url": "/fhir/p.ndjson", "count": 3}]}
    with scripted(manifest, Reply(b"\n".join(lines))) as server:
        client = FhirClient(server.url, retrier=QUICK_RETRIES, limits=ClientLimits(line_bytes=4000))
        bulk_source = BulkSource(client, store, lambda: connect(database, cipher=NO_ENCRYPTION))
        items = list(bulk_source.fetch(["Patient"], Interval(None, datetime(2900, 1, 1, tzinfo=UTC))))
    rejected = [item for item in items if isinstance(item, RejectedInput)]
    assert [item.id for item in items if isinstance(item, Record)] == ["a", "c"]
    assert [(item.resource_type, item.rule, item.message) for item in rejected] == [
        ("Patient", "json", "a line longer than the limit for one resource")
    ]
    assert bulk_source.drain_notices() == ()


def test_a_manifest_that_is_too_large_is_refused_before_it_is_kept(store: Store, database: str) -> None:
    manifest = {**MANIFEST, "padding": "x" * 200_000}
    with scripted(manifest) as server:
        client = FhirClient(server.url, retrier=QUICK_RETRIES, limits=ClientLimits(answer_bytes=100_000))
        bulk_source = BulkSource(client, store, lambda: connect(database, cipher=NO_ENCRYPTION))
        with pytest.raises(NotFhir, match="larger than 100000 bytes"):
            ids(bulk_source)


def test_a_manifest_whose_parts_have_no_end_is_refused(store: Store, database: str) -> None:
    number = count(1)

    def poll() -> Reply:
        link = {"relation": "next", "url": f"/fhir/status?part={next(number)}"}
        return reply({**MANIFEST, "link": [link]})

    with scripted(MANIFEST, poll=poll) as server:
        client = FhirClient(server.url, retrier=QUICK_RETRIES, limits=ClientLimits(max_files=9))
        bulk_source = BulkSource(client, store, lambda: connect(database, cipher=NO_ENCRYPTION))
        with pytest.raises(NotFhir, match="more than 9 files"):
            ids(bulk_source)
