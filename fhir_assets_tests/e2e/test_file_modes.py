"""What another account can read after a load by the commands, whatever the umask they are started with: nothing."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import sleep

import psutil
import pytest

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.warehouse.postgres.db import embedded
from fhir_assets_tests.support.content import add, patient

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DAY = datetime(2024, 1, 5, tzinfo=UTC)


@dataclass
class Site:
    """A deployment whose processes are started with a umask."""

    root: Path
    server: SandboxServer
    umask: int = 0
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def environment(self) -> dict[str, str]:
        unset = ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL", "DB_URL")
        return {name: value for name, value in os.environ.items() if name not in unset} | {
            "FHIR_ASSETS_HOME": str(self.home),
            "FHIR_BASE_URL": self.server.url,
            "FHIR_RESOURCE_TYPES": "Patient",
            "FHIR_LAST_UPDATED_GTE": f"{DAY:%Y-%m-%d}",
            "FHIR_PARTITION": "monthly",
            "FHIR_LAKE_URL": str(self.root / "shared" / "lake"),
            "FHIR_EXPORT_URL": str(self.root / "shared" / "exports"),
            "FHIR_LANDING_URL": str(self.home / "landing"),
            "PYTHONPATH": str(ROOT),
            **self.variables,
        }

    def run(self, *command: str) -> None:
        done = subprocess.run(
            command, env=self.environment, umask=self.umask, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def fhir_assets(self, *arguments: str) -> None:
        self.run(sys.executable, "-c", "from fhir_assets.cli import main; main()", *arguments)

    def dagster(self, *arguments: str) -> None:
        self.run(str(Path(sys.executable).with_name("dagster")), *arguments)


@pytest.fixture
def site() -> Iterator[Site]:
    with SandboxServer([]) as server, tempfile.TemporaryDirectory(prefix="fhir_assets_modes_") as folder:
        Path(folder).chmod(0o711)
        add(server, patient("a", DAY), patient("b", DAY, gender="neither"))
        site = Site(Path(folder), server)
        yield site
        embedded.stop(site.home)


def find_open(folder: Path) -> list[str]:
    """Return the entries of a folder, and the folder itself, that group or others may read, write, list or enter."""
    return sorted(
        f"{path.relative_to(folder)} {stat.filemode(status.st_mode)}"
        for path in (folder, *folder.rglob("*"))
        if not stat.S_ISLNK((status := path.lstat()).st_mode) and status.st_mode & 0o077
    )


def load(site: Site) -> None:
    site.fhir_assets("landing", "init")
    site.fhir_assets("ingest", "--to", f"{DAY:%Y-%m-%d}")
    site.fhir_assets("export", "Patient", "--raw", "--dead-letters", "-o", str(site.root / "shared" / "all"))


@pytest.mark.parametrize("umask", [0o000, 0o022], ids=oct)
def test_nobody_else_reads_what_a_deployment_writes(site: Site, umask: int) -> None:
    site.umask = umask
    load(site)
    # A run of Dagster's own command, which starts the processes of the project without its command line.
    module = ("-m", "fhir_assets.definitions")
    site.dagster("asset", "materialize", *module, "--select", "normalized/patient", "--partition", "2024-01-01")
    # The embedded Postgres of root runs as another user, who must pass through the home, and may not list it.
    expected = [". drwx--x--x"] if os.geteuid() == 0 else []
    assert find_open(site.home) == expected
    assert find_open(site.root / "shared") == []
    written = {path.name for path in site.root.rglob("*") if path.is_file()}
    assert {"store.json", "dagster.yaml", "PG_VERSION", "Patient.raw.ndjson", "manifest.json"} <= written
    assert any(name.endswith(".parquet") for name in written)


def test_the_setting_opens_the_lake_and_exports_only(site: Site) -> None:
    site.variables["FHIR_FILE_MODE"] = "0640"
    load(site)
    assert [line for line in find_open(site.home) if not line.startswith(". ")] == []
    shared = [path for path in (site.root / "shared").rglob("*") if path.name != ".spool"]
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in shared if path.is_file()} == {"0o640"}
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in shared if path.is_dir()} == {"0o750"}


def test_a_code_server_of_dagster_creates_private_files(site: Site) -> None:
    program = str(Path(sys.executable).with_name("dagster"))
    command = [program, "api", "grpc", "--port", str(find_free_port()), "--module-name", "fhir_assets.definitions"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=site.environment, umask=site.umask, cwd=ROOT, stdout=log, stderr=log)
        try:
            while not psutil.Process(process.pid).net_connections():
                assert process.poll() is None, "the server ended"
                sleep(0.1)
            status = Path(f"/proc/{process.pid}/status").read_text()
        finally:
            process.terminate()
            process.wait()
    assert "Umask:\t0077\n" in status
