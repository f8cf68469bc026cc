"""The FHIR server that the deployment loads from: it can be killed and comes back with the same resources."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import requests

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.sandbox.faults import FaultPlan


class Source:
    """A sandbox server in a process, at an address that stays the same. ``ids`` are those of its Patients."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir()
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}/fhir"
        self.ids: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._append({"resourceType": "Patient", "id": "source-0", "meta": {"lastUpdated": "2024-01-30T08:00:00Z"}})

    def start(self, faults: FaultPlan | None = None) -> None:
        """Start the server, which then has all resources that it ever had, and may have faults."""
        command = [sys.executable, "-m", "fhir_assets.sandbox", "--data", str(self._folder), "--port", str(self.port)]
        if faults:
            command += ["--faults", faults.model_dump_json()]
        with (self._folder.parent / "source.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        """End the server as ``kill -9`` does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def create_patient(self) -> None:
        """Create a Patient on the server, unless the server does not answer."""
        key = f"source-{len(self.ids)}"
        resource = {"resourceType": "Patient", "id": key, "active": True}
        try:
            answer = requests.put(f"{self.url}/Patient/{key}", json=resource, timeout=30)
        except requests.RequestException:
            return
        if answer.status_code in (200, 201):
            self._append(answer.json())

    def _append(self, resource: dict[str, Any]) -> None:
        with (self._folder / "Patient.ndjson").open("ab") as file:
            file.write(orjson.dumps(resource) + b"\n")
        self.ids.append(resource["id"])
