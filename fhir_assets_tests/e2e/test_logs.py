"""The log of the pipeline: lines of JSON with run, resource types and window, without patient data."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from fhir_assets import logs
from fhir_assets.sandbox.faults import Fault, FaultKind, RequestKind
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets_tests.support.content import patient
from fhir_assets_tests.support.deployment import Deploy

DAY = datetime(2024, 1, 5, tzinfo=UTC)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """The stream that the project's loggers write to, configured as in Dagster's processes."""
    own_logger = logging.getLogger("fhir_assets")
    before = own_logger.handlers[:], own_logger.propagate, own_logger.level
    stream = io.StringIO()
    logs.configure("dagster", "INFO", stream=stream, libraries=False)
    yield stream
    own_logger.handlers[:], own_logger.propagate = before[:2]
    own_logger.setLevel(before[2])


def test_every_step_leaves_a_line_and_a_failed_one_its_reason(deploy: Deploy, stream: io.StringIO) -> None:
    bodies = [patient(f"p{n}", DAY, name=[{"family": "Canary"}], gender="male") for n in range(3)]
    with SandboxServer(bodies) as server:
        deployment = deploy(
            fhir_base_url=server.url,
            fhir_resource_types="Patient",
            fhir_last_updated_gte="2024-01-01",
            fhir_max_attempts=1,
        )
        [succeeded] = deployment.ingest(first=DAY, last=DAY + timedelta(days=1))
        server.set_faults(Fault(kind=FaultKind.ERROR, on=frozenset({RequestKind.SEARCH})))
        [failed_run] = deployment.ingest(first=DAY + timedelta(days=1), last=DAY + timedelta(days=2))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    done = [line for line in lines if line.get("run") == succeeded.run_id]
    assert len(done) == 3
    assert {(line["level"], line["window"]) for line in done} == {("INFO", "2024-01-05")}
    assert {line["service"] for line in lines} == {"dagster"}
    assert all(line["types"] == ["Patient"] and line["seconds"] >= 0 for line in done)
    [failed] = [line for line in lines if line.get("run") == failed_run.run_id]
    assert failed["level"] == "ERROR"
    assert "500" in failed["reason"]
    assert "Canary" not in stream.getvalue()


def test_messages_of_libraries_are_logged_without_their_arguments(stream: io.StringIO) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    logs.configure("connector", stream=stream)
    url = "http://server/fhir/Patient?identifier=http%3A%2F%2Fhospital%7CCanary"
    logging.getLogger("urllib3.connection").warning("Failed to parse headers (url=%s): %s", url, "Canary")
    logging.getLogger("fhir_assets.somewhere").warning("so many: %s", 3)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["Failed to parse headers (url=%s): %s", "so many: 3"]
