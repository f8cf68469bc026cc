"""The four uses of the Dagster UI in a real browser: materialize, backfill, watch a schedule, review a failed check.

Chromium and chromedriver are Debian's (``apt-get install chromium chromium-driver``); without them it is skipped.
The last page of a story is in UI_SCREENSHOTS (default: the folder of the test).
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.orchestration.jobs import INCREMENTAL_LOAD
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.browser import Browser, find_missing_programs, open_browser
from fhir_assets_tests.support.content import patient

MISSING = find_missing_programs()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {MISSING}: `apt-get install chromium chromium-driver`, as .ci/run does"
    ),
]

_COMMAND = [sys.executable, "-c", "from fhir_assets.cli import main; main()"]
_RUN_SECONDS = 120
"""The longest time that a run may take, from its request to its end, on a busy machine."""
_NEWEST_RUN = """
query ($job: String) {
    runsOrError(filter: {pipelineName: $job}, limit: 1) { ... on Runs { results { runId } } }
}
"""
_ICONS_OF_REEXECUTE = """
return [...document.querySelectorAll("button")]
    .filter(button => button.innerText.startsWith("Re-execute all"))
    .flatMap(button => [...button.querySelectorAll("[role=img]")].map(icon => icon.getAttribute("aria-label")))
"""
MATERIALIZATION = "__ASSET_JOB"
"""The job of the runs that *Materialize* starts."""


@dataclass(frozen=True)
class Demo:
    """A demo whose UI is served at ``url``; its sandbox server is at ``source``."""

    url: str
    source: str
    database: str
    environment: dict[str, str]

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        with connect(self.database) as conn:
            return conn.execute(statement).fetchall()

    def command(self, *arguments: str) -> None:
        subprocess.run([*_COMMAND, *arguments], env=self.environment, check=True, timeout=120, capture_output=True)

    def find_newest_run(self, job: str) -> str | None:
        body = {"query": _NEWEST_RUN, "variables": {"job": job}}
        answer = requests.post(f"{self.url}/graphql", json=body, timeout=60).json()
        return next((str(run["runId"]) for run in answer["data"]["runsOrError"]["results"]), None)


@pytest.fixture
def demo(tmp_path: Path, database: str) -> Iterator[Demo]:
    """A demo of 150 Patients over 30 days and a schedule that ticks every minute."""
    port = find_free_port()
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    environment |= {
        "FHIR_ASSETS_HOME": str(tmp_path / "home"),
        "DB_URL": database,
        "DAGSTER_POSTGRES_URL": normalise_url(database, "psycopg2"),
        "FHIR_RESOURCE_TYPES": "Patient",
        "FHIR_SCHEDULE": "* * * * *",
    }
    log = tmp_path / "demo.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*_COMMAND, "demo", "--port", str(port)], env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for_ui(url, process)
            found = re.search(r"Sandbox FHIR server: (\S+)", log.read_text())
            assert found
            yield Demo(url, found.group(1), database, environment | {"FHIR_BASE_URL": found.group(1)})
        finally:
            process.terminate()


def _wait_for_ui(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = datetime.now(UTC) + timedelta(seconds=180)
    while datetime.now(UTC) < end and process.poll() is None:
        try:
            if requests.get(f"{url}/server_info", timeout=5).ok:
                return
        except requests.RequestException:
            pass
    raise AssertionError("the demo does not serve its UI")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    folder = Path(os.environ.get("UI_SCREENSHOTS", tmp_path))
    with open_browser(tmp_path / "profile") as browser:
        try:
            yield browser
        finally:
            browser.take_screenshot(folder / "last_page.png")


def wait_for_run(browser: Browser, demo: Demo, job: str, *, after: str | None) -> None:
    """Wait until a run of a job that is newer than ``after`` has succeeded, on its own page."""
    end = datetime.now(UTC) + timedelta(seconds=_RUN_SECONDS)
    while (run := demo.find_newest_run(job)) == after:
        assert datetime.now(UTC) < end, f"no run of {job} began"
        time.sleep(0.5)
    browser.open(f"{demo.url}/runs/{run}")
    browser.wait_for(r"\bSuccess\b", seconds=_RUN_SECONDS)


def open_partitions(browser: Browser, demo: Demo, asset: str) -> None:
    browser.open(f"{demo.url}/assets/{asset}?view=partitions")
    browser.wait_for(r"Materialized \([1-9]")


def open_check_partitions(browser: Browser, demo: Demo, pattern: str, *, seconds: float | None = None) -> None:
    """Open the tab *Partitions* of the check of dead letters, again and again until it says ``pattern``."""
    end = datetime.now(UTC) + timedelta(seconds=seconds or 60)
    while True:
        browser.open(f"{demo.url}/assets/normalized/patient?view=checks&checkDetail=dead_letter_rate")
        browser.wait_for(r"Execution history")
        browser.click("(//*[normalize-space(text())='Partitions'])[last()]")
        browser.wait_for(r"Passed \([1-9]")
        try:
            browser.wait_for(pattern, seconds=5)
            return
        except AssertionError:
            if datetime.now(UTC) > end:
                raise


def execute_a_run_of_the_demo_again(browser: Browser, demo: Demo) -> None:
    before = demo.find_newest_run(INCREMENTAL_LOAD)
    [(run,)] = demo.query(f"SELECT run_id FROM runs WHERE pipeline_name = '{INCREMENTAL_LOAD}' ORDER BY id LIMIT 1")
    browser.open(f"{demo.url}/runs/{run}")
    browser.wait_for(r"Re-execute all")
    # The icon is an error until the page has loaded the code location, and a warning for another version of the job.
    end = datetime.now(UTC) + timedelta(seconds=30)
    while (icons := set(browser.run(_ICONS_OF_REEXECUTE))) & {"error", "warning"}:
        assert datetime.now(UTC) < end, icons
        time.sleep(0.5)
    browser.click("//button[starts-with(normalize-space(.), 'Re-execute all')]")
    wait_for_run(browser, demo, INCREMENTAL_LOAD, after=before)


def materialize_a_window(browser: Browser, demo: Demo) -> None:
    before = demo.find_newest_run(MATERIALIZATION)
    open_partitions(browser, demo, "normalized/patient")
    assert "Materialized (31)" in browser.text
    browser.click_text("Materialize…")
    browser.wait_for(r"Launch runs to materialize")
    browser.click("//*[contains(@class, 'dagster-dialog')]//*[normalize-space(text())='Latest']")
    browser.wait_for(r"\b1 partition\b")
    browser.click_text("Launch 1 run")
    wait_for_run(browser, demo, MATERIALIZATION, after=before)
    open_partitions(browser, demo, "normalized/patient")
    browser.wait_for(r"Failed \(0\)")


def backfill_all_days(browser: Browser, demo: Demo) -> None:
    before = demo.find_newest_run(MATERIALIZATION)
    open_partitions(browser, demo, "raw/patient")
    browser.click_text("Materialize…")
    browser.wait_for(r"Launch runs to materialize")
    browser.click("//*[contains(@class, 'dagster-dialog')]//*[normalize-space(text())='All']")
    browser.wait_for(r"\b31 partitions\b")
    browser.click_text("Launch backfill")
    wait_for_run(browser, demo, MATERIALIZATION, after=before)
    # The list of events shows only the rows in sight.
    browser.type("//input[@placeholder='Filter…']", "Patient:")
    browser.wait_for(r"Patient: 150 fetched")
    browser.open(f"{demo.url}/runs?view=backfills")
    browser.wait_for(r"Completed|Success", seconds=_RUN_SECONDS, reload_every=10)
    open_partitions(browser, demo, "raw/patient")
    browser.wait_for(r"Materialized \(31\)")


def watch_a_scheduled_tick(browser: Browser, demo: Demo) -> None:
    now = datetime.now(UTC)
    body = json.loads(patient("scheduled", now))
    requests.put(f"{demo.source}/Patient/scheduled", json=body, timeout=30).raise_for_status()
    browser.open(f"{demo.url}/locations/fhir_assets/schedules/incremental_load")
    browser.wait_for(r"Every minute")
    browser.wait_for(r"1 run requested", seconds=150, reload_every=15)
    end = datetime.now(UTC) + timedelta(seconds=_RUN_SECONDS)
    while not demo.query("SELECT FROM fhir.patient WHERE id = 'scheduled'"):
        assert datetime.now(UTC) < end, "the scheduled run did not load the new patient"
        time.sleep(0.5)
    browser.open(f"{demo.url}/locations/fhir_assets/sensors/alerts")
    browser.wait_for(r"0 runs requested", seconds=60, reload_every=10)
    browser.click("//button[normalize-space(.)='0 runs requested']")
    browser.wait_for(r"Read \d+ ended runs and \d+ evaluations of checks")


def review_and_replay_a_failed_check(browser: Browser, demo: Demo) -> None:
    open_check_partitions(browser, demo, r"(?<!Execution )Failed \([1-9]")
    [(identity, window)] = demo.query(
        "SELECT id, partition_key FROM ops.dead_letters WHERE resource_type = 'Patient' AND path = 'Patient.gender'"
        " AND status = 'open' ORDER BY id LIMIT 1"
    )
    browser.click_text(str(window))
    browser.wait_for(r"resources \([\d.]+%\) are dead letters, most of them required-binding at Patient.gender")
    number = int(re.findall(r"(?<!Execution )Failed \((\d+)\)", browser.text)[0])
    screenshots = os.environ.get("UI_SCREENSHOTS")
    if screenshots:
        browser.take_screenshot(Path(screenshots) / "failed_check.png")
    patch = Path(demo.environment["FHIR_ASSETS_HOME"]) / "patch.json"
    patch.write_text('[{"op": "replace", "path": "/gender", "value": "female"}]')
    demo.command("dead-letters", "edit", str(identity), "--patch", str(patch), "--by", "ui")
    others = demo.query(
        "SELECT id FROM ops.dead_letters WHERE resource_type = 'Patient' AND status = 'open'"
        f" AND partition_key = '{window}' AND id <> {identity}"
    )
    if others:
        demo.command("dead-letters", "discard", *(str(other) for (other,) in others), "--reason", "test data")
    before = demo.find_newest_run("request_replay")
    browser.open(f"{demo.url}/locations/fhir_assets/jobs/request_replay/playground")
    browser.wait_for(r"resource_type: any")
    browser.wait_for(r"No errors")
    browser.click("//button[normalize-space(.)='Launch Run']")
    wait_for_run(browser, demo, "request_replay", after=before)
    open_check_partitions(browser, demo, rf"(?<!Execution )Failed \({number - 1}\)", seconds=_RUN_SECONDS)
    assert demo.query(f"SELECT status FROM ops.dead_letters WHERE id = {identity}") == [("resolved",)]


def test_the_four_uses_of_the_ui(demo: Demo, browser: Browser) -> None:
    execute_a_run_of_the_demo_again(browser, demo)
    materialize_a_window(browser, demo)
    backfill_all_days(browser, demo)
    watch_a_scheduled_tick(browser, demo)
    review_and_replay_a_failed_check(browser, demo)
