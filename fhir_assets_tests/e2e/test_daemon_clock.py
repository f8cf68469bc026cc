"""Dagster's daemon ends when its clock is set back by hours, and not when it is set forward.

The clock of the process is set by libfaketime, Debian's package ``faketime``.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.deployment import Deploy, Deployment
from fhir_assets_tests.support.deployment_daemon import NEVER, START, environment
from fhir_assets_tests.support.soak.clock import SteppedClock

HOURS = 7200

pytestmark = pytest.mark.slow


@pytest.fixture
def clock(tmp_path: Path) -> SteppedClock:
    clock = SteppedClock(tmp_path)
    if not clock.environment:
        pytest.skip("needs libfaketime (Debian's package faketime), which CI installs")
    return clock


@pytest.fixture
def deployment(deploy: Deploy, tmp_path: Path) -> Deployment:
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "Patient.ndjson").write_bytes(patient("p1", START) + b"\n")
    return deploy(fhir_source="ndjson", fhir_base_url=str(folder), fhir_resource_types="Patient")


@pytest.fixture
def daemon(deployment: Deployment, clock: SteppedClock) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon, after its first heartbeats."""
    command = [str(Path(sys.executable).with_name("dagster-daemon")), "run", "-m", "fhir_assets.definitions"]
    variables = {**environment(deployment, FHIR_SCHEDULE=NEVER), **clock.environment}
    with subprocess.Popen(command, env=variables, cwd=deployment.settings.home, stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: "SENSOR" in deployment.instance.get_daemon_heartbeats(), seconds=120)
            yield process
        finally:
            process.terminate()


def test_a_daemon_whose_clock_is_set_back_ends(daemon: subprocess.Popen[bytes], clock: SteppedClock) -> None:
    clock.step(HOURS)
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.wait(12)
    clock.step(0)
    daemon.wait(90)
