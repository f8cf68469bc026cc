"""The pipeline as processes of the command line, with encryption keys and with all output stored."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.deployment import Deployment
from fhir_assets_tests.support.leak_scan import Site


class Pipeline:
    """A deployment with keys. It stores the output of every process."""

    def __init__(self, deployment: Deployment, site: Site) -> None:
        self.deployment = deployment
        self.site = site
        self._number = 0

    def environment(self, **changed: str) -> dict[str, str]:
        settings = self.deployment.settings
        keys = settings.phi_encryption_keys
        assert keys
        kept = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
        return {
            **kept,
            **self.deployment.environment(),
            "PHI_ENCRYPTION_KEYS": keys.get_secret_value(),
            "PHI_REQUIRED": "1",
            "FHIR_VIEWS": str(settings.fhir_views),
            "FHIR_MAX_ATTEMPTS": "1",
            "FHIR_LANDING_URL": settings.fhir_landing_url,
            "LOG_LEVEL": "DEBUG",
            "TMPDIR": str(self.site.temporary),
            **changed,
        }

    def start(self, *arguments: str, **changed: str) -> "subprocess.Popen[bytes]":
        """Start ``fhir-assets`` in a process of its own."""
        self._number += 1
        name = "-".join(argument for argument in arguments[:2] if argument.isalpha())
        with (self.site.output / f"{self._number:02}-{name}").open("wb") as output:
            return subprocess.Popen(
                [str(Path(sys.executable).with_name("fhir-assets")), *arguments],
                env=self.environment(**changed),
                stdout=output,
                stderr=output,
                cwd=self.site.home,
                start_new_session=True,
            )

    def run(self, *arguments: str, **changed: str) -> int:
        """Run ``fhir-assets`` and return its exit code."""
        return self.start(*arguments, **changed).wait(180)

    def show(self, *arguments: str) -> bytes:
        """Run ``fhir-assets`` and return its output, which is for those who hold the keys and is not stored."""
        command = [str(Path(sys.executable).with_name("fhir-assets")), *arguments]
        return subprocess.run(
            command, env=self.environment(), cwd=self.site.home, check=True, capture_output=True, timeout=180
        ).stdout

    def ingest(self, day: datetime, **changed: str) -> int:
        return self.run("ingest", "--from", f"{day:%Y-%m-%d}", "--to", f"{day:%Y-%m-%d}", **changed)

    def killed(self, day: datetime, **changed: str) -> None:
        """Start a load and kill it while it inserts rows."""
        with connect(self.site.url, autocommit=True) as conn:
            conn.execute(
                "CREATE FUNCTION public.wait() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM pg_sleep(60); RETURN NEW; END $$;"
                "CREATE TRIGGER wait BEFORE INSERT ON fhir.patient_name FOR EACH ROW EXECUTE FUNCTION public.wait()"
            )
            process = self.start("ingest", "--from", f"{day:%Y-%m-%d}", "--to", f"{day:%Y-%m-%d}", **changed)
            asleep = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
            while not conn.execute(asleep).fetchone():
                assert process.poll() is None
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            conn.execute(f"SELECT pg_terminate_backend(pid) FROM ({asleep}) asleep".encode())
            conn.execute("DROP FUNCTION public.wait CASCADE")
