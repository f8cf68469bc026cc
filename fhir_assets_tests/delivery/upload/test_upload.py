"""``fhir-assets upload`` to servers that accept, fail and refuse."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.fernet import Fernet

from fhir_assets.catalog import LOAD_ORDER
from fhir_assets.delivery.upload.journal import Journal
from fhir_assets.errors import ConfigurationError, ServerRefused
from fhir_assets.sandbox.fault_injection import Credentials
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.scripted_server import ScriptedServer
from fhir_assets_tests.support.uploads import BatchResponder, Upload, assert_same, lines_of, patient, read_back, write

SYNTHEA = Path(__file__).resolve().parents[4] / "shared" / "data" / "synthea"
BATCH = frozenset({RequestKind.BATCH})
EVERY_FAULT = (
    Fault(kind=FaultKind.THROTTLE, on=BATCH, every=31, retry_after=0),
    Fault(kind=FaultKind.ERROR, on=BATCH, every=37),
    Fault(kind=FaultKind.RESET, on=BATCH, every=41),
    Fault(kind=FaultKind.DROP, on=BATCH, every=43),
    Fault(kind=FaultKind.TRUNCATE, on=BATCH, every=47),
    Fault(kind=FaultKind.HTML, on=BATCH, every=53),
)


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a synthetic population: two patients, resources of all 30 types."""
    folder = tmp_path_factory.mktemp("population")
    write_population(folder, Population(2, 1))
    return folder


def dead_letters(upload: Upload) -> list[tuple[Any, ...]]:
    with connect(os.environ["DB_URL"]) as conn:
        return conn.execute(
            "SELECT resource_type, resource_id, rule, status, message FROM ops.dead_letters WHERE stage = 'deliver'"
            " ORDER BY id"
        ).fetchall()


def test_an_uploaded_population_is_found_unchanged_by_search_despite_faults(upload: Upload, population: Path) -> None:
    """The server injects every fault and refuses references without a target, so the order of the resources matters."""
    upload.home.joinpath("input").symlink_to(population)
    sent = lines_of(population)
    with SandboxServer(faults=EVERY_FAULT, referential_integrity=True) as server:
        summary = upload("--batch-size", "20", url=server.url)
        assert len(server.stats()["struck"]) == len(EVERY_FAULT)
        server.set_faults()
        assert_same(sent, read_back(server.url, LOAD_ORDER))
    assert summary["success"]
    assert summary["totals"]["failed"] == 0
    assert not upload.failures.exists()
    assert dead_letters(upload) == []
    assert not list((upload.home / "uploads").glob("*.sqlite"))


def test_types_are_uploaded_in_the_order_of_the_catalog_under_any_file_names(upload: Upload) -> None:
    write(upload.input / "MimicPatient.ndjson.gz", [patient(f"p{n}") for n in range(30)])
    write(
        upload.input / "deep" / "Patient_part1.ndjson",
        [{"resourceType": "Observation", "id": f"o{n}"} for n in range(30)]
        + [{"resourceType": "Organization", "id": f"g{n}"} for n in range(30)]
        + [patient(f"q{n}") for n in range(30)],
    )
    with SandboxServer() as server:
        summary = upload("--batch-size", "7", url=server.url)
        held = read_back(server.url, ["Organization", "Patient", "Observation"])
    assert [counts["type"] for counts in summary["types"]] == ["Organization", "Patient", "Observation"]
    assert summary["totals"] == {"created": 120, "updated": 0, "unchanged": 0, "failed": 0}
    times: dict[str, list[str]] = {}
    for name, body in held.items():
        times.setdefault(name.split("/")[0], []).append(json.loads(body)["meta"]["lastUpdated"])
    assert max(times["Organization"]) <= min(times["Patient"])
    assert max(times["Patient"]) <= min(times["Observation"])


def test_forward_and_circular_references_are_uploaded_completely(upload: Upload) -> None:
    """The references are within a type, between types, in a chain against the order, and to a member of a cycle."""
    chain = [
        {"resourceType": "Organization", "id": f"g{n}", "partOf": {"reference": f"Organization/g{n + 1}"}}
        for n in range(30)
    ]
    write(upload.input / "a.ndjson", [*chain, {"resourceType": "Organization", "id": "g30"}])
    write(
        upload.input / "b.ndjson",
        [
            patient("p1", link=[{"other": {"reference": "Patient/p2"}, "type": "seealso"}]),
            patient("p2", link=[{"other": {"reference": "Patient/p1"}, "type": "seealso"}]),
            {
                "resourceType": "Encounter",
                "id": "e",
                "subject": {"reference": "Patient/p1"},
                "diagnosis": [{"condition": {"reference": "Condition/c"}}],
            },
            {"resourceType": "Condition", "id": "c", "encounter": {"reference": "Encounter/e"}},
            {"resourceType": "Observation", "id": "o", "encounter": {"reference": "Encounter/e"}},
        ],
    )
    with SandboxServer(referential_integrity=True) as server:
        summary = upload("--batch-size", "4", url=server.url)
        held = read_back(server.url, LOAD_ORDER)
    assert_same(lines_of(upload.input), held)
    assert summary["totals"] == {"created": 36, "updated": 0, "unchanged": 0, "failed": 0}
    assert json.loads(held["Observation/o"])["meta"]["versionId"] == "1"
    assert json.loads(held["Encounter/e"])["meta"]["versionId"] == "2"


def test_a_permanently_refused_resource_is_recorded_and_the_others_are_uploaded(upload: Upload) -> None:
    write(
        upload.input / "Patient.ndjson",
        [
            patient("good"),
            patient("bad id", name=[{"family": "Canary"}]),
            {"resourceType": "Patient"},
            b'{"resourceType":"Patient","id":"cut',
            {"resourceType": "Observation", "id": "o", "subject": {"reference": "Patient/nobody"}},
        ],
    )
    with SandboxServer(referential_integrity=True) as server:
        summary = upload(url=server.url, exit_code=1)
        assert read_back(server.url, ["Patient", "Observation"]).keys() == {"Patient/good"}
    assert summary["success"] is False
    assert summary["totals"] == {"created": 1, "updated": 0, "unchanged": 0, "failed": 4}
    refused = {line["place"]: line for line in upload.refused()}
    assert refused.keys() == {f"Patient.ndjson:{n}" for n in (2, 3, 4, 5)}
    assert refused["Patient.ndjson:2"]["status"] == 400
    assert refused["Patient.ndjson:2"]["resource"]["name"] == [{"family": "Canary"}]
    assert refused["Patient.ndjson:5"]["outcome"]["issue"][0]["code"] == "not-found"
    assert refused["Patient.ndjson:4"]["resource"] == '{"resourceType":"Patient","id":"cut'
    assert upload.failures.stat().st_mode & 0o077 == 0
    assert {(name, identity, rule) for name, identity, rule, *_ in dead_letters(upload)} == {
        ("Patient", None, "unusable"),
        ("unknown", None, "unusable"),
        ("Patient", None, "http-400"),  # the id is not reported: it is invalid, so it may be a name
        ("Observation", "o", "http-422"),
    }
    assert "Canary" not in str(dead_letters(upload))
    assert upload.last
    assert "Canary" not in upload.last.output


def test_resuming_sends_failed_resources_again_and_resolves_their_dead_letters(upload: Upload) -> None:
    write(
        upload.input / "o.ndjson",
        [{"resourceType": "Observation", "id": "o", "subject": {"reference": "Patient/p"}}],
    )
    with SandboxServer(referential_integrity=True) as server:
        upload(url=server.url, exit_code=1)
        assert [status for *_, status, _ in dead_letters(upload)] == ["open"]
        requests.put(f"{server.url}/Patient/p", json=patient("p"), timeout=10).raise_for_status()
        assert upload("--resume", url=server.url)["totals"]["created"] == 1
    assert [status for *_, status, _ in dead_letters(upload)] == ["resolved"]
    assert not upload.failures.exists()


def test_transactions_leave_out_only_invalid_resources(upload: Upload) -> None:
    write(upload.input / "p.ndjson", [patient("a bad id" if n == 13 else str(n)) for n in range(30)])
    with SandboxServer() as server:
        summary = upload("--transaction", url=server.url, exit_code=1)
        assert len(read_back(server.url, ["Patient"])) == 29
    assert summary["totals"] == {"created": 29, "updated": 0, "unchanged": 0, "failed": 1}


def test_skip_unchanged_does_not_send_resources_that_the_server_has_with_the_same_content(upload: Upload) -> None:
    value = b'{"resourceType":"Observation","id":"o%d","valueQuantity":{"value":%s}}'
    write(upload.input / "o.ndjson", [value % (n, b"1.50") for n in range(20)])
    with SandboxServer() as server:
        upload(url=server.url)
        write(upload.input / "o.ndjson", [value % (n, b"1.5" if n == 3 else b"1.50") for n in range(20)])
        summary = upload("--skip-unchanged", url=server.url)
        held = read_back(server.url, ["Observation"])
    assert summary["totals"] == {"created": 0, "updated": 1, "unchanged": 19, "failed": 0}
    assert {name for name, body in held.items() if json.loads(body)["meta"]["versionId"] != "1"} == {"Observation/o3"}


def test_the_last_line_of_a_resource_is_the_final_version(upload: Upload) -> None:
    rng = random.Random(1)
    ids = [str(rng.randrange(40)) for _ in range(300)]
    write(upload.input / "a.ndjson", [patient(identity, birthDate=f"{n:04d}") for n, identity in enumerate(ids)])
    last = {f"Patient/{identity}": f"{n:04d}" for n, identity in enumerate(ids)}
    with SandboxServer() as server:
        upload("--workers", "4", "--batch-size", "10", url=server.url)
        held = read_back(server.url, ["Patient"])
    assert {name: json.loads(body)["birthDate"] for name, body in held.items()} == last


def test_a_resumed_upload_must_have_the_same_files_and_batch_size(upload: Upload) -> None:
    write(upload.input / "p.ndjson", [patient("a bad id")])
    with SandboxServer() as server:
        upload(url=server.url, exit_code=1)
        with pytest.raises(ConfigurationError, match="--batch-size 100"):
            upload("--resume", "--batch-size", "5", url=server.url)
        write(upload.input / "p.ndjson", [patient("p"), patient("q")])
        with pytest.raises(ConfigurationError, match="files have changed"):
            upload("--resume", url=server.url)
        assert upload(url=server.url)["totals"]["created"] == 2


def test_a_running_upload_cannot_be_started_a_second_time(upload: Upload) -> None:
    write(upload.input / "p.ndjson", [patient(str(n)) for n in range(10)])

    def judge(identity: str, time: int) -> int:
        if identity == "5":
            with pytest.raises(ConfigurationError, match="another upload"):
                Upload(upload.home)(url=server.url)
        return 201

    with ScriptedServer(BatchResponder(judge)) as server:
        assert upload(url=server.url)["totals"]["created"] == 10


def test_server_credentials_and_batch_size_come_from_the_environment(
    upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(upload.input / "p.ndjson", [patient(str(n)) for n in range(10)])
    with SandboxServer(credentials=Credentials(token="secret")) as server:
        monkeypatch.setenv("FHIR_AUTH_TOKEN", "secret")
        monkeypatch.setenv("FHIR_BASE_URL", server.url)
        monkeypatch.setenv("BATCH_SIZE", "2")
        assert upload("--workers", "1")["totals"]["created"] == 10
        assert server.stats()["requests"]["batch"] == 5
        monkeypatch.setenv("FHIR_AUTH_TOKEN", "wrong")
        with pytest.raises(ServerRefused, match="FHIR_AUTH_TOKEN"):
            upload()


def test_with_keys_the_journal_contains_no_plain_text_resource(upload: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", Fernet.generate_key().decode())
    write(upload.input / "p.ndjson", [patient("a bad id", name=[{"family": "Canary"}])])
    with SandboxServer() as server:
        upload(url=server.url, exit_code=1)
        [journal] = (upload.home / "uploads").glob("*.sqlite")
        assert b"Canary" not in journal.read_bytes()
        assert upload("--resume", url=server.url, exit_code=1)["totals"]["failed"] == 1
    assert upload.refused()[0]["resource"]["name"] == [{"family": "Canary"}]


def test_with_keys_dead_letters_have_labels_in_place_of_names_of_files(
    upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = "SELECT path FROM ops.dead_letters WHERE stage = 'deliver' ORDER BY path"
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", Fernet.generate_key().decode())
    write(upload.input / "Doe.ndjson", [patient("good"), patient("a bad id")])
    (upload.input / "Roe:1.ndjson.gz").symlink_to(upload.home)
    with SandboxServer() as server, connect(os.environ["DB_URL"]) as conn:
        upload(url=server.url, exit_code=1)
        paths = [path for (path,) in conn.execute(query)]
        assert not [path for path in paths if "oe" in path]
        files = {file["label"]: file["file"] for file in upload("--list", url=server.url)["files"]}
    assert sorted(line["place"] for line in upload.refused()) == ["Doe.ndjson:2", "Roe:1.ndjson.gz"]
    assert len(paths) == 2
    [line] = [path for path in paths if path.endswith(":2")]
    assert files == {line.removesuffix(":2"): "Doe.ndjson"}


def test_with_keys_the_journal_has_no_name_of_a_file_and_is_resumed(
    upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", Fernet.generate_key().decode())
    write(upload.input / "Doe.ndjson", [patient("good"), patient("a bad id"), patient("refused")])
    write(upload.input / "Roe.ndjson", [patient("another")])
    batches = BatchResponder(lambda identity, time: 422 if identity == "refused" else 201)
    with ScriptedServer(batches) as server:
        first = upload(url=server.url, exit_code=1)
        stored = b"".join(path.read_bytes() for path in (upload.home / "uploads").rglob("*") if path.is_file())
        assert not [name for name in (b"Doe", b"Roe") if name in stored]
        assert upload("--resume", url=server.url, exit_code=1)["totals"] == first["totals"]
    assert (batches.times["good"], batches.times["another"]) == (1, 1)
    assert sorted(line["place"] for line in upload.refused())[-1] == "Doe.ndjson:3"


def test_an_upload_of_an_earlier_release_whose_journal_names_the_files_is_resumed(
    upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI_ENCRYPTION_KEYS", Fernet.generate_key().decode())
    write(upload.input / "Doe.ndjson", [patient("good"), patient("refused")])
    batches = BatchResponder(lambda identity, time: 422 if identity == "refused" else 201)
    with ScriptedServer(batches) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "hide_names", lambda self, names: None)
            first = upload(url=server.url, exit_code=1)
        assert upload("--resume", url=server.url, exit_code=1)["totals"] == first["totals"]
    assert batches.times["good"] == 1
    assert [line["place"] for line in upload.refused()] == ["Doe.ndjson:2"]


def test_without_keys_dead_letters_name_the_files(upload: Upload) -> None:
    write(upload.input / "Doe.ndjson", [patient("a bad id")])
    with SandboxServer() as server, connect(os.environ["DB_URL"]) as conn:
        upload(url=server.url, exit_code=1)
        assert conn.execute("SELECT path FROM ops.dead_letters").fetchall() == [("Doe.ndjson:1",)]
        assert upload("--list", url=server.url)["files"] == [{"type": "Patient", "file": "Doe.ndjson", "resources": 1}]


def test_an_input_without_files_is_a_clear_error(upload: Upload) -> None:
    upload.input.mkdir()
    with pytest.raises(ConfigurationError, match=r"no \.ndjson"):
        upload(url="http://127.0.0.1:9/fhir")


def command(upload: Upload, url: str, *options: str) -> "subprocess.Popen[bytes]":
    code = "from fhir_assets.cli import main; main()"
    arguments = ["upload", "--input", str(upload.input), "--url", url, *options]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=upload.home,
    )


def sent_so_far(server: SandboxServer) -> int:
    return sum(type_store.count() for type_store in server.store.type_stores.values())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_upload_is_completed_when_resumed(upload: Upload, population: Path, number: signal.Signals) -> None:
    upload.home.joinpath("input").symlink_to(population)
    sent = lines_of(population)
    # After a third of the batches the server becomes so slow that the kill precedes the last batch.
    slow = Fault(kind=FaultKind.SLOW, on=BATCH, seconds=3, after=len(sent) // 30)
    with SandboxServer(faults=(slow,), referential_integrity=True) as server:
        process = command(upload, server.url, "--batch-size", "10")
        while sent_so_far(server) < len(sent) // 4:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode != 0
        if number != signal.SIGKILL:
            assert b"--resume" in errors
        before = sent_so_far(server)
        assert before < len(sent)
        server.set_faults(*EVERY_FAULT)
        server.reset_stats()
        resumed = command(upload, server.url, "--batch-size", "10", "--resume")
        output, errors = resumed.communicate()
        assert resumed.returncode == 0, errors
        server.set_faults()
        held = read_back(server.url, LOAD_ORDER)
    assert_same(sent, held)
    assert b"Uploaded" in output
    again = sum(json.loads(body)["meta"]["versionId"] != "1" for body in held.values())
    assert again < len(sent) / 2, "the resumed upload sent most resources again"


@pytest.mark.skipif(not SYNTHEA.exists(), reason="the shared Synthea population is not here")
@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_synthea_is_found_unchanged_by_search_despite_faults(upload: Upload, kill: bool) -> None:
    upload.home.joinpath("input").symlink_to(SYNTHEA)
    sent = lines_of(SYNTHEA)
    slow = Fault(kind=FaultKind.SLOW, on=BATCH, seconds=3, after=len(sent) // 200)
    with SandboxServer(faults=(*EVERY_FAULT, slow) if kill else EVERY_FAULT) as server:
        if kill:
            process = command(upload, server.url)
            while sent_so_far(server) < len(sent) // 4:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            server.set_faults(*EVERY_FAULT)
        summary = upload(*(["--resume"] if kill else []), url=server.url)
        server.set_faults()
        assert_same(sent, read_back(server.url, {name.split("/")[0] for name in sent}))
    assert summary["totals"]["failed"] == 0
    assert sum(summary["totals"].values()) == len(sent)


def test_output_without_a_terminal_is_plain_lines_with_all_facts(upload: Upload) -> None:
    write(upload.input / "Patient.ndjson", [patient(str(n), name=[{"family": "Canary"}]) for n in range(25)])
    with SandboxServer() as server:
        process = command(upload, server.url, "--batch-size", "10", "--workers", "1")
        printed, errors = process.communicate()
    out = printed.decode()
    assert process.returncode == 0, errors
    for expected in (
        "Source",
        server.url,
        "batches of 10",
        "FHIR 4.0.1",
        "Step 1/1: Patient, 25",
        "10 created, 0 updated",
    ):
        assert expected in out
    assert "Duration" in out
    assert "\x1b[" not in out
    assert "Canary" not in out + errors.decode()
