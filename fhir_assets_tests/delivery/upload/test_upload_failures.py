"""Uploads to servers that refuse entries or whole batches, for a time or always."""

import os
import time

import orjson
import pytest

from fhir_assets.delivery.upload.journal import BatchKey, BatchResult, Journal
from fhir_assets.errors import ConfigurationError, NotFhir, ServerRefused
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply
from fhir_assets_tests.support.uploads import BatchResponder, Claimant, Upload, patient, write


@pytest.mark.parametrize("status", [429, 500, 503, 409, 412])
def test_an_entry_with_a_transient_failure_is_sent_again_alone(upload: Upload, status: int) -> None:
    write(upload.input / "p.ndjson", [patient(str(n)) for n in range(10)])
    batches = BatchResponder(lambda identity, time: status if identity == "7" and time == 1 else 201)
    with ScriptedServer(batches) as server:
        assert upload("--workers", "1", url=server.url)["totals"]["created"] == 10
    assert batches.sent == [[str(n) for n in range(10)], ["7"]]


def test_an_entry_that_always_fails_is_given_up_and_the_others_are_sent_once(upload: Upload) -> None:
    write(upload.input / "p.ndjson", [patient(str(n)) for n in range(10)])
    batches = BatchResponder(lambda identity, time: 412 if identity == "7" else 200)
    with ScriptedServer(batches) as server:
        summary = upload("--workers", "1", url=server.url, exit_code=1)
    assert summary["totals"] == {"created": 0, "updated": 9, "unchanged": 0, "failed": 1}
    assert [line["resource"]["id"] for line in upload.refused()] == ["7"]
    assert {identity for identity, times in batches.times.items() if times > 1} == {"7"}


def test_a_failure_file_that_cannot_be_written_leaves_the_failures_in_the_dead_letters(upload: Upload) -> None:
    write(upload.input / "Patient.ndjson", [patient("p")])
    with ScriptedServer(BatchResponder(lambda identity, attempt: 422)) as server:
        with pytest.raises(ConfigurationError, match=r"--resume and another --failures.*ops\.dead_letters"):
            upload("--failures", "absent/failures.ndjson", url=server.url)
        with connect(os.environ["DB_URL"]) as conn:
            query = "SELECT resource_id FROM ops.dead_letters WHERE stage = 'deliver' AND status = 'open'"
            assert conn.execute(query).fetchall() == [("p",)]
        upload("--resume", url=server.url, exit_code=1)
    assert [line["resource"]["id"] for line in upload.refused()] == ["p"]


@pytest.mark.parametrize("kind", ["link", "device", "file"])
def test_an_upload_without_failures_removes_no_link_and_no_device(upload: Upload, kind: str) -> None:
    write(upload.input / "Patient.ndjson", [patient("p")])
    target, path = upload.home / "target", upload.home / "failures"
    if kind == "device":
        os.mkfifo(path)
    else:
        target.write_bytes(b"of an earlier upload")
        path.symlink_to(target) if kind == "link" else target.rename(path)
    with ScriptedServer(BatchResponder(lambda identity, attempt: 201)) as server:
        upload("--failures", str(path), url=server.url)
    assert path.is_fifo() == (kind == "device")
    assert path.is_symlink() == (kind == "link")
    assert not path.is_file() or path.read_bytes() == b""
    assert path.exists() == (kind != "file")


def test_a_refused_older_line_does_not_overwrite_a_newer_one(upload: Upload) -> None:
    lines = [patient("p", gender="male"), patient("q"), patient("p", gender="female")]
    write(upload.input / "p.ndjson", lines)
    batches = BatchResponder(lambda identity, time: 422 if (identity, time) == ("p", 1) or identity == "q" else 200)
    with ScriptedServer(batches) as server:
        summary = upload("--workers", "1", url=server.url, exit_code=1)
        assert summary["totals"]["failed"] == 1
        upload("--workers", "1", "--resume", url=server.url, exit_code=1)
    assert batches.times["p"] == 2


def test_concurrent_results_are_recorded_in_the_order_of_their_lines(
    upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_commit(journal: Journal, key: BatchKey, done: BatchResult) -> None:
        time.sleep(0.03)  # in this time the results of several batches arrive
        commit(journal, key, done)

    commit = Journal.commit
    monkeypatch.setattr(Journal, "commit", slow_commit)
    write(
        upload.input / "p.ndjson",
        [patient(f"p{n}", gender=gender) for n in range(40) for gender in ("male", "female")],
    )
    batches = BatchResponder(lambda _, time: 422 if time == 1 else 200)
    with ScriptedServer(batches) as server:
        summary = upload("--workers", "4", url=server.url)
    assert summary["totals"]["failed"] == 0


def test_an_entry_that_crashes_the_server_does_not_stop_the_others(
    upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FHIR_MAX_ATTEMPTS", "2")
    write(upload.input / "p.ndjson", [patient(str(n)) for n in range(4)])
    with ScriptedServer(BatchResponder(lambda *_: 201, lambda ids: 500 if "2" in ids else 200)) as server:
        summary = upload("--workers", "1", url=server.url, exit_code=1)
    assert summary["totals"] == {"created": 3, "updated": 0, "unchanged": 0, "failed": 1}
    [refused] = upload.refused()
    assert refused["resource"]["id"] == "2"
    assert "no answer" in refused["reason"]


@pytest.mark.parametrize("status", [413, 400, 422])
def test_a_batch_that_is_refused_as_a_whole_is_split_in_halves(upload: Upload, status: int) -> None:
    write(upload.input / "p.ndjson", [patient(str(n)) for n in range(10)])
    batches = BatchResponder(lambda *_: 201, lambda ids: status if len(ids) > 3 else 200)
    with ScriptedServer(batches) as server:
        assert upload("--workers", "1", url=server.url)["totals"]["created"] == 10
    assert max(len(ids) for ids in batches.sent if len(ids) <= 3) <= 3
    assert sum(batches.times.values()) == 10


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_a_server_that_refuses_all_batches_ends_the_upload(upload: Upload, status: int) -> None:
    write(upload.input / "p.ndjson", [patient("1")])
    with (
        ScriptedServer(BatchResponder(lambda *_: 201, lambda ids: status)) as server,
        pytest.raises(ServerRefused, match=str(status)),
    ):
        upload(url=server.url)


ERROR = {"resourceType": "OperationOutcome", "issue": [{"severity": "error", "code": "exception"}]}
CLAIMS = [{}, {"location": "Patient/another/_history/1"}, {"outcome": ERROR, "location": "Patient/1/_history/1"}]


@pytest.mark.parametrize("says", CLAIMS)
def test_an_entry_is_not_believed_for_its_status(upload: Upload, says: dict[str, object]) -> None:
    write(upload.input / "p.ndjson", [patient("1")])
    with ScriptedServer(Claimant(says, lambda times: False)) as server:
        summary = upload("--workers", "1", url=server.url, exit_code=1)
    assert summary["totals"] == {"created": 0, "updated": 0, "unchanged": 0, "failed": 1}
    [refused] = upload.refused()
    assert refused["reason"] == "the server answered 200, but does not have what was sent"


@pytest.mark.parametrize("says", CLAIMS)
@pytest.mark.parametrize("times", [1, 2])
def test_an_entry_with_nothing_but_a_status_is_read_back_and_sent_again(
    upload: Upload, says: dict[str, object], times: int
) -> None:
    write(upload.input / "p.ndjson", [patient("1"), patient("2")])
    claimant = Claimant(says, lambda received: received == times)
    with ScriptedServer(claimant) as server:
        summary = upload("--workers", "1", url=server.url)
    assert summary["totals"]["failed"] == 0
    assert claimant.times == {"Patient/1": times, "Patient/2": times}


@pytest.mark.parametrize(
    "body",
    [{"status": "maintenance"}, ERROR, {"resourceType": "Bundle", "type": "searchset", "entry": [{}]}, []],
)
def test_an_answer_that_is_no_bundle_of_responses_ends_the_upload(
    upload: Upload, monkeypatch: pytest.MonkeyPatch, body: object
) -> None:
    monkeypatch.setenv("FHIR_MAX_ATTEMPTS", "2")
    write(upload.input / "p.ndjson", [patient("1")])

    def answer(request: ReceivedRequest) -> Reply:
        if request.method == "GET":
            return reply({"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"})
        return Reply(orjson.dumps(body))

    with ScriptedServer(answer) as server, pytest.raises(NotFhir):
        upload(url=server.url)
    with ScriptedServer(BatchResponder(lambda *_: 201)) as server:
        assert upload(url=server.url)["totals"]["created"] == 1
