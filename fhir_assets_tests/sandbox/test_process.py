"""The sandbox server in a subprocess."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from fhir_assets.errors import ConfigurationError, ServerUnavailable
from fhir_assets.sandbox.population import Population, write_population
from fhir_assets.sandbox.process import SandboxProcess, SandboxServer, serve


def test_a_sandbox_process_serves_a_written_population_and_ends_with_its_parent(tmp_path: Path) -> None:
    summary = write_population(tmp_path, Population(3))
    with SandboxProcess(tmp_path) as server:
        assert server.stats()["resources"] == summary.resources
        url = server.url
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(f"{url}/metadata", timeout=10)


def test_an_empty_sandbox_process_accepts_resources() -> None:
    with SandboxProcess() as server:
        patient = {"resourceType": "Patient", "id": "p"}
        assert requests.put(f"{server.url}/Patient/p", json=patient, timeout=10).status_code == 201


def test_a_folder_without_resources_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ServerUnavailable, match=r"contains no \.ndjson"), SandboxProcess(tmp_path):
        pass


def test_a_line_that_is_not_a_resource_is_an_error_without_its_content(tmp_path: Path) -> None:
    (tmp_path / "x.ndjson").write_text('\n{"resourceType":"Patient","id":"1"}\n\n{"secret"\n')
    with pytest.raises(ConfigurationError, match="Resource 2") as exc_info:
        SandboxServer(tmp_path)
    assert "secret" not in str(exc_info.value)


def test_an_occupied_port_is_a_clear_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigurationError, match="--port"):
            serve(None, other.getsockname()[1])


def test_ctrl_c_ends_the_server_without_a_traceback() -> None:
    command = [sys.executable, "-m", "fhir_assets.sandbox", "--empty"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Sandbox FHIR server: http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "")
        assert process.returncode == 0
