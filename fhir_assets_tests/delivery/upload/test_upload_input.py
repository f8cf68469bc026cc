"""What an upload sends: a folder, a bucket, or the folder of the environment."""

import json
import os
from pathlib import Path

import boto3
import pytest
import typer
from typer.testing import CliRunner, Result

from fhir_assets.cli.upload import upload as upload_command
from fhir_assets.errors import ConfigurationError, ServerRefused
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.scripted_server import ReceivedRequest, Reply, ScriptedServer, reply
from fhir_assets_tests.support.uploads import Upload, patient, read_back, write

OBSERVATION = {"resourceType": "Observation", "id": "o", "status": "final", "code": {"text": "a"}}


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(upload_command)
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def put_files(url: str, folder: Path) -> None:
    """Copy a folder to a bucket."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


@pytest.fixture
def files(upload: Upload) -> Path:
    write(upload.input / "b" / "Observation.ndjson.gz", [OBSERVATION])
    write(upload.input / "Patient.ndjson", [patient("1"), patient("2"), b"{broken"])
    (upload.input / "notes.txt").write_text("not NDJSON")
    return upload.input


def test_the_list_has_the_types_in_order_and_sends_nothing(files: Path) -> None:
    done = run("--input", str(files), "--list", "--json")
    assert done.exit_code == 0
    listed = json.loads(done.stdout)
    assert listed["files"] == [
        {"type": "Patient", "file": "Patient.ndjson", "resources": 2},
        {"type": "Observation", "file": "b/Observation.ndjson.gz", "resources": 1},
    ]
    assert [line["location"] for line in listed["unusable"]] == ["Patient.ndjson:3"]
    assert "broken" not in done.stdout


def test_a_bucket_is_listed_and_uploaded_and_leaves_no_files(upload: Upload, files: Path, s3_url: str) -> None:
    put_files(s3_url, files)
    listed = json.loads(run("--input", s3_url, "--list", "--json").stdout)
    assert [row["file"] for row in listed["files"]] == ["Patient.ndjson", "b/Observation.ndjson.gz"]
    with SandboxServer() as server:
        done = run("--input", s3_url, "--url", server.url, "--json")
        assert json.loads(done.stdout)["totals"] == {"created": 3, "updated": 0, "unchanged": 0, "failed": 1}
        assert set(read_back(server.url, ["Patient", "Observation"])) == {"Patient/1", "Patient/2", "Observation/o"}
        assert len(upload.refused()) == 1
        write(upload.input / "Patient.ndjson", [patient("1"), patient("2")])
        put_files(s3_url, upload.input)
        assert run("--input", s3_url, "--url", server.url).exit_code == 0
    assert [path for path in (upload.home / "uploads").rglob("*") if path.is_file()] == []


def test_an_unfinished_upload_of_a_bucket_is_resumed(upload: Upload, s3_url: str) -> None:
    write(upload.input / "Patient.ndjson", [patient(str(number)) for number in range(6)])
    put_files(s3_url, upload.input)

    def refuse_bundles(request: ReceivedRequest) -> Reply:
        if request.method == "GET":
            return reply({"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"})
        return reply({"resourceType": "OperationOutcome", "issue": []}, 401)

    with ScriptedServer(refuse_bundles) as server:
        with pytest.raises(ServerRefused):
            run("--input", s3_url, "--url", server.url, "-s", "2")
        assert list((upload.home / "uploads").rglob("*.ndjson")) == [], "clear text does not stay"
        with pytest.raises(ServerRefused):
            run("--input", s3_url, "--url", server.url, "-s", "2", "--resume")
        write(upload.input / "Patient.ndjson", [patient("another")])
        put_files(s3_url, upload.input)
        with pytest.raises(ConfigurationError, match="have changed"):
            run("--input", s3_url, "--url", server.url, "-s", "2", "--resume")


def test_names_of_other_uploaders_work(upload: Upload, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(files / "Patient.ndjson", [patient("1")])
    headers: list[str | None] = []

    def answer(request: ReceivedRequest) -> Reply:
        headers.append(request.headers.get("Authorization"))
        return reply({"resourceType": "OperationOutcome", "issue": []}, 403)

    monkeypatch.setenv("TMP_DIR", str(files))
    monkeypatch.setenv("FHIR_USERNAME", "u")
    monkeypatch.setenv("FHIR_PASSWORD", "p")
    with ScriptedServer(answer) as server:
        monkeypatch.setenv("FHIR_BASE_URL", server.url)
        with pytest.raises(ServerRefused):
            run()
        monkeypatch.setenv("FHIR_AUTH_ENABLED", "false")
        with pytest.raises(ServerRefused):
            run()
    assert set(headers) == {"Basic dTpw", None}
    assert headers[0] == "Basic dTpw"


def test_an_input_without_files_is_one_clear_error(upload: Upload, s3_url: str) -> None:
    with pytest.raises(ConfigurationError, match="pass --input, or set UPLOAD_DIR"):
        run()
    with pytest.raises(ConfigurationError, match="there is no"):
        run("--input", s3_url, "--list")
    with pytest.raises(ConfigurationError, match="create it, or correct"):
        run("--input", "s3://no-such-bucket-at-all", "--list")
    assert not os.path.exists(upload.failures)
