"""Exports of servers that are slow, late, wrong about the time or about their files: every resource is loaded once."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import orjson
import pytest

from fhir_assets.errors import FhirAssetsError, NotFhir, ServerRefused
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets_tests.support.bulk_server import BulkServer, Manifest, RequestedExport
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, reply

pytestmark = pytest.mark.slow

START = (datetime.now(UTC) - timedelta(days=3)).replace(microsecond=0)
UNDATED = orjson.dumps({"resourceType": "Patient", "id": "undated", "gender": "female"})


def bulk(deploy: Deploy, server: BulkServer, **settings: Any) -> Deployment:
    values = {"fhir_partition": "monthly", "fhir_resource_types": "Patient", "fhir_bulk_fresh_minutes": 0, **settings}
    return deploy(home="bulk", fhir_source="bulk", fhir_base_url=server.url, **values)


def ids(deployment: Deployment) -> list[str]:
    return [key for (key,) in deployment.query("SELECT id FROM fhir.resource WHERE resource IS NOT NULL ORDER BY id")]


def load(deployment: Deployment) -> list[str]:
    """Load the due windows, and return the failed checks."""
    outcomes = deployment.ingest()
    assert all(outcome.success for outcome in outcomes)
    return [fault for outcome in outcomes for fault in deployment.unreconciled(outcome)]


def rows_in_raw(deployment: Deployment) -> int:
    keys = deployment.store.partition_keys("raw", "Patient")
    return sum(manifest.rows for manifest in deployment.store.manifests("raw", "Patient", keys))


def test_an_export_that_takes_longer_than_it_is_fresh_is_requested_once_and_loses_nothing(deploy: Deploy) -> None:
    with BulkServer(("Patient", [patient("dated", START), UNDATED, b"no json"]), pending=2) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
        assert len(server.exports) == 1
        assert server.exports[0].deleted
    assert ids(deployment) == ["dated", "undated"]
    assert deployment.count_dead_letters() == {"json": 1}


def _fail(*args: object) -> None:
    raise OSError("the disk is full")


@pytest.mark.parametrize("at", ["status", "file"])
def test_an_export_goes_on_after_a_kill_however_long_ago_it_was_requested(deploy: Deploy, at: str) -> None:
    down = [True]

    def answer(kind: str, export: RequestedExport | None, request: ReceivedRequest) -> Reply | None:
        return Reply(reset=True) if down[0] and kind == at else None

    with BulkServer(("Patient", [patient("dated", START), UNDATED]), answer=answer) as server:
        deployment = bulk(deploy, server, fhir_max_attempts=1)
        with pytest.raises(FhirAssetsError):
            deployment.ingest()
        down[0] = False
        assert load(deployment) == []
        assert len(server.exports) == 1
    assert ids(deployment) == ["dated", "undated"]


def test_an_export_that_was_not_loaded_is_used_by_the_next_load(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BulkServer(("Patient", [patient("dated", START), UNDATED])) as server:
        deployment = bulk(deploy, server)
        ingestion = deployment.ingestion()
        [windows] = due = ingestion.due_loads.find()
        ingestion.due_loads.begin_checkpoints(due)
        with monkeypatch.context() as patch:
            patch.setattr("fhir_assets.pipeline.fetch.step.PartWriter.finish", _fail)
            assert not ingestion.load(windows, refresh=Refresh.MISSING, triggered_by="test").success
        assert load(deployment) == []
        assert len(server.exports) == 1
    assert ids(deployment) == ["dated", "undated"]


def test_a_type_that_is_added_later_is_exported_in_full_and_the_others_since_their_last_export(deploy: Deploy) -> None:
    organization = {"resourceType": "Organization", "id": "undated", "name": "Ward"}
    with BulkServer(("Patient", [patient("p", START)]), ("Organization", [orjson.dumps(organization)])) as server:
        load(bulk(deploy, server))
        deployment = bulk(deploy, server, fhir_resource_types="Patient,Organization")
        load(deployment)
        requests = [(export.query["_type"], "_since" in export.query) for export in server.exports]
    assert requests == [("Patient", False), ("Organization", False), ("Patient", True)]
    assert ids(deployment) == ["p", "undated"]


def test_resources_from_before_since_are_loaded_and_reconcile_and_known_ones_are_not_stored_again(
    deploy: Deploy,
) -> None:
    with BulkServer(("Patient", [patient(f"p{n}", START) for n in range(3)])) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
        joined = patient("joined", START - timedelta(days=500))
        server.files = [("Patient", [*(patient(f"p{n}", START) for n in range(3)), joined])]
        for _ in range(2):
            assert load(deployment) == []
    assert ids(deployment) == ["joined", "p0", "p1", "p2"]
    assert rows_in_raw(deployment) == 4, "a server that ignores _since does not fill the store"


@pytest.mark.parametrize("invalid", ["a b", "a\0b", "x" * 65])
def test_a_resource_from_before_since_whose_id_is_invalid_is_a_dead_letter(deploy: Deploy, invalid: str) -> None:
    with BulkServer(("Patient", [patient("p", START)])) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
        server.files = [("Patient", [patient(invalid, START - timedelta(days=500))])]
        assert load(deployment) == []
    assert ids(deployment) == ["p"]
    assert sum(deployment.count_dead_letters().values()) == 1


def test_a_window_that_does_not_reconcile_is_read_again_from_an_export_of_everything_and_becomes_green(
    deploy: Deploy,
) -> None:
    counts = [2]

    def bend(manifest: Manifest, export: RequestedExport) -> None:
        manifest["output"][0]["count"] = counts[0]

    with BulkServer(("Patient", [patient("p", START), UNDATED, b"no json"]), bend=bend) as server:
        deployment = bulk(deploy, server, fhir_max_attempts=1)
        assert load(deployment)
        assert ids(deployment) == ["p", "undated"]
        counts[0] = 3
        assert load(deployment) == []
        assert ["_since" in export.query for export in server.exports] == [False, False]
        load(deployment)
        assert "_since" in server.exports[-1].query
    assert ids(deployment) == ["p", "undated"]
    assert deployment.count_dead_letters() == {"json": 1}


def test_resources_from_before_the_first_window_are_counted_and_not_loaded(deploy: Deploy) -> None:
    start = START.replace(day=1, hour=0, minute=0, second=0)
    with BulkServer(("Patient", [patient("p", START)])) as server:
        deployment = bulk(deploy, server, fhir_last_updated_gte=start.isoformat())
        load(deployment)
        server.files = [("Patient", [patient("old", start - timedelta(days=1))])]
        [outcome] = deployment.ingest()
    assert outcome.success
    assert ids(deployment) == ["p"]
    materializations = deployment.instance.get_records_for_run(
        outcome.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION
    ).records
    counts = [
        record.asset_materialization.metadata["older_than_FHIR_LAST_UPDATED_GTE"].value
        for record in materializations
        if record.asset_materialization and "older_than_FHIR_LAST_UPDATED_GTE" in record.asset_materialization.metadata
    ]
    assert counts
    assert set(counts) == {1}


def test_resources_from_after_the_transaction_time_are_loaded_once(deploy: Deploy) -> None:
    late = patient("late", datetime.now(UTC) + timedelta(seconds=100))
    with BulkServer(("Patient", [patient("p", START), late])) as server:
        deployment = bulk(deploy, server)
        for _ in range(3):
            assert load(deployment) == []
    assert ids(deployment) == ["late", "p"]
    assert rows_in_raw(deployment) == 2


@pytest.mark.parametrize("ahead", [timedelta(minutes=5), timedelta(hours=2), timedelta(days=26000)])
def test_a_transaction_time_ahead_of_the_servers_clock_is_refused_and_the_next_export_loses_nothing(
    deploy: Deploy, ahead: timedelta
) -> None:
    with BulkServer(("Patient", [patient("p", START), UNDATED])) as server:
        deployment = bulk(deploy, server)
        server.time = lambda kick_off: kick_off + ahead
        with pytest.raises(NotFhir, match="ahead of the server's clock"):
            deployment.ingest()
        server.time = lambda kick_off: kick_off
        assert load(deployment) == []
    assert ids(deployment) == ["p", "undated"]


def test_a_transaction_time_is_trusted_no_further_than_the_kick_off(deploy: Deploy) -> None:
    with BulkServer(("Patient", [patient("p", START)])) as server:
        deployment = bulk(deploy, server, fhir_overlap_seconds=0)
        server.time = lambda kick_off: kick_off + timedelta(seconds=40)
        load(deployment)
        load(deployment)
        first, second = server.exports
    assert datetime.fromisoformat(second.query["_since"]) <= first.at


def test_a_transaction_time_before_since_is_refused(deploy: Deploy) -> None:
    with BulkServer(("Patient", [patient("p", START)])) as server:
        deployment = bulk(deploy, server)
        load(deployment)
        server.time = lambda _: datetime(2001, 1, 1, tzinfo=UTC)
        [outcome] = deployment.ingest()
        assert not outcome.success
        server.time = lambda kick_off: kick_off
        server.files = [("Patient", [patient("q", datetime.now(UTC))])]
        load(deployment)
    assert ids(deployment) == ["p", "q"]


@pytest.mark.parametrize("lines", [[], [patient("p", START)]], ids=["empty", "contradicted"])
def test_a_transaction_time_of_long_ago_is_no_empty_success(deploy: Deploy, lines: list[bytes]) -> None:
    with BulkServer(("Patient", lines)) as server:
        server.time = lambda _: datetime(2001, 1, 1, tzinfo=UTC)
        with pytest.raises(NotFhir, match="transactionTime is 2001-01-01"):
            bulk(deploy, server).ingest()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_links_that_have_run_out_are_renewed_by_the_status(deploy: Deploy, status: int) -> None:
    def answer(kind: str, export: RequestedExport | None, request: ReceivedRequest) -> Reply | None:
        return Reply(status=status) if kind == "file" and request.all("poll") == ["1"] else None

    with BulkServer(("Patient", [patient("p", START)]), answer=answer) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
        assert [export.polls for export in server.exports] == [2]
    assert ids(deployment) == ["p"]


def test_stored_files_are_kept_when_links_are_renewed(deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhir_assets.pipeline.fetch.bulk_download.GROUP_FILES", 1)

    def answer(kind: str, export: RequestedExport | None, request: ReceivedRequest) -> Reply | None:
        has_run_out = request.path == "/fhir/file/1/1" and request.all("poll") == ["1"]
        return Reply(status=403) if has_run_out else None

    files = [("Patient", [patient(f"p{n}", START)]) for n in range(3)]
    with BulkServer(*files, answer=answer) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
        downloads = [request.path for request in server.requests if "/file/" in request.path]
    assert downloads == ["/fhir/file/1/0", "/fhir/file/1/1", "/fhir/file/1/1", "/fhir/file/1/2"]
    assert ids(deployment) == ["p0", "p1", "p2"]


def test_new_links_of_other_files_begin_the_download_anew(deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fhir_assets.pipeline.fetch.bulk_download.GROUP_FILES", 1)

    def bend(manifest: Manifest, export: RequestedExport) -> None:
        if export.polls > 1:
            for file in manifest["output"]:
                file["url"] = file["url"].replace("/file/", "/other/")

    def answer(kind: str, export: RequestedExport | None, request: ReceivedRequest) -> Reply | None:
        return Reply(status=403) if request.path == "/fhir/file/1/1" else None

    files = [("Patient", [patient(f"p{n}", START)]) for n in range(3)]
    with BulkServer(*files, bend=bend, answer=answer) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
    assert ids(deployment) == ["p0", "p1", "p2"]
    assert rows_in_raw(deployment) == 3


def test_files_that_are_always_refused_end_with_a_clear_error_and_two_exports(deploy: Deploy) -> None:
    refuses = [True]

    def answer(kind: str, export: RequestedExport | None, request: ReceivedRequest) -> Reply | None:
        return Reply(status=403) if kind == "file" and refuses[0] else None

    with BulkServer(("Patient", [patient("p", START)]), answer=answer) as server:
        deployment = bulk(deploy, server)
        with pytest.raises(ServerRefused, match=r"Patient at http://127.0.0.1:\d+ is refused \(403\)"):
            deployment.ingest()
        assert len(server.exports) == 2
        refuses[0] = False
        assert load(deployment) == []
        assert len(server.exports) == 2, "the export that was kept has been continued"
    assert ids(deployment) == ["p"]


def _outcome(*severities: str) -> bytes:
    issues = [{"severity": severity, "code": "processing"} for severity in severities]
    return orjson.dumps({"resourceType": "OperationOutcome", "issue": issues})


def test_only_errors_of_an_error_file_are_dead_letters_and_the_rest_is_counted(deploy: Deploy) -> None:
    errors = [_outcome("information"), _outcome("warning"), _outcome("warning", "error"), _outcome("fatal"), b"{}"]
    with BulkServer(("Patient", [patient("p", START)]), errors=errors) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
    assert deployment.count_dead_letters() == {"export-error": 3}
    keys = deployment.store.partition_keys("raw", "Patient")
    notices = {
        notice.message.partition(": ")[2]
        for manifest in deployment.store.manifests("raw", "Patient", keys)
        if manifest.fetched
        for notice in manifest.fetched.notices
    }
    assert notices == {"the server reports 1 warnings, 1 informations in addition to the resources"}


def _drop(*names: str) -> Callable[[Manifest, RequestedExport], object]:
    return lambda manifest, export: [manifest.pop(name, None) for name in names]


@pytest.mark.parametrize(
    ("bend", "expected"),
    [
        (_drop("output"), []),
        (_drop("error", "request", "requiresAccessToken"), ["p"]),
        (lambda manifest, export: manifest.update(output=None, error=None, deleted=None), []),
        (lambda manifest, export: manifest["output"][0].update(count="1"), ["p"]),
        (lambda manifest, export: manifest.update(output=manifest["output"] * 2), ["p"]),
        (lambda manifest, export: manifest["output"].append({"type": "Goal", "url": "/goals"}), ["p"]),
    ],
    ids=["no-output", "bare", "nulls", "count-as-text", "file-twice", "other-type"],
)
def test_manifests_are_read_leniently(
    deploy: Deploy, bend: Callable[[Manifest, RequestedExport], object], expected: list[str]
) -> None:
    with BulkServer(("Patient", [patient("p", START)]), bend=bend) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
    assert ids(deployment) == expected
    assert rows_in_raw(deployment) == len(expected)


def test_a_manifest_in_parts_is_read_to_its_last_part(deploy: Deploy) -> None:
    files = [("Patient", [patient(f"p{n}", START)]) for n in range(3)]

    def bend(manifest: Manifest, export: RequestedExport) -> None:
        manifest["output"] = manifest["output"][export.polls - 1 : export.polls]
        if export.polls < 3:
            manifest["link"] = [{"relation": "next", "url": f"/fhir/status/{export.number}"}]

    with BulkServer(*files, bend=bend) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
    assert ids(deployment) == ["p0", "p1", "p2"]


def test_a_resource_of_another_type_in_a_file_belongs_to_its_own_type_or_is_a_dead_letter(deploy: Deploy) -> None:
    organization = orjson.dumps({"resourceType": "Organization", "id": "o", "name": "Ward"})
    goal = orjson.dumps({"resourceType": "Goal", "id": "g"})
    with BulkServer(("Patient", [patient("p", START), organization, goal])) as server:
        deployment = bulk(deploy, server, fhir_resource_types="Patient,Organization")
        assert load(deployment) == []
    assert ids(deployment) == ["o", "p"]
    assert deployment.count_dead_letters() == {"structure": 1}


def test_the_resources_of_a_line_that_is_a_bundle_are_loaded(deploy: Deploy) -> None:
    entries = [{"resource": orjson.loads(patient(key, START))} for key in ("q", "r")]
    bundle = {"resourceType": "Bundle", "type": "collection", "entry": entries}
    half = {**bundle, "type": "searchset", "entry": [{"resource": orjson.loads(patient("s", START))}]}
    half["link"] = [{"relation": "next", "url": "https://server.example/next"}]
    with BulkServer(("Patient", [patient("p", START), orjson.dumps(bundle), orjson.dumps(half)])) as server:
        deployment = bulk(deploy, server)
        assert load(deployment) == []
    assert ids(deployment) == ["p", "q", "r", "s"]
    assert deployment.count_dead_letters() == {"structure": 1}


@pytest.mark.parametrize(
    ("level", "refusal", "sentence"),
    [
        (
            "system",
            "_type=Patient,Organization: Organization is unknown",
            "refuses Organization: remove the type from FHIR",
        ),
        ("patient", "not in the compartment", "does not contain Organization: .* or set FHIR_BULK_LEVEL to system"),
        ("group/g", "no", "does not contain Organization"),
    ],
)
def test_a_type_that_the_export_refuses_fails_alone_and_the_reason_names_the_setting(
    deploy: Deploy, level: str, refusal: str, sentence: str
) -> None:
    issue = {"severity": "error", "code": "not-supported", "diagnostics": refusal}
    refuses = [True]

    def answer(kind: str, export: RequestedExport | None, request: ReceivedRequest) -> Reply | None:
        is_refused = refuses[0] and kind == "export" and "Organization" in request.all("_type")[0]
        return reply({"resourceType": "OperationOutcome", "issue": [issue]}, 400) if is_refused else None

    old = {"resourceType": "Organization", "id": "o", "name": "Ward", "meta": {"lastUpdated": "2026-01-05T00:00:00Z"}}
    with BulkServer(("Patient", [patient("p", START)]), ("Organization", [orjson.dumps(old)]), answer=answer) as server:
        deployment = bulk(deploy, server, fhir_resource_types="Patient,Organization", fhir_bulk_level=level)
        for _ in range(2):
            [outcome] = deployment.ingest()
            assert not outcome.success
            assert ids(deployment) == ["p"]
            [(reason, types)] = deployment.query(
                "SELECT error, array_agg(DISTINCT resource_type) FROM ops.ingestion_runs"
                " WHERE run_id = %s AND status = 'FAILED' GROUP BY 1",
                outcome.run_id,
            )
            assert re.search(sentence, reason)
            assert "(400: not-supported)" in reason
            assert types == ["Organization"]
        refuses[0] = False
        assert load(deployment) == []
    assert ids(deployment) == ["o", "p"], "the history of the type is loaded once it is offered"


def test_an_export_that_is_refused_without_naming_a_type_ends_with_a_clear_error(deploy: Deploy) -> None:
    issue = {"severity": "error", "code": "not-supported"}
    refusal = reply({"resourceType": "OperationOutcome", "issue": [issue]}, 400)
    with BulkServer(answer=lambda kind, export, request: refusal) as server:
        deployment = bulk(deploy, server, fhir_resource_types="Patient,Organization")
        with pytest.raises(ServerRefused, match="it names no type: shorten FHIR_RESOURCE_TYPES"):
            deployment.ingest()


def test_the_status_is_polled_past_caches(deploy: Deploy) -> None:
    with BulkServer(("Patient", [patient("p", START)])) as server:
        load(bulk(deploy, server))
        headers = {
            request.headers.get("Cache-Control")
            for request in server.requests
            if "status" in request.path and request.method == "GET"
        }
    assert headers == {"no-cache"}
