"""The dashboard as Streamlit runs it, and as `fhir-assets dashboard` and `fhir-assets dev` serve it.

Streamlit is in the environment of `make dbt-story`.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import requests

import fhir_assets
from fhir_assets.cli.local_ports import find_free_port
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.browser import find_missing_programs, open_browser
from fhir_assets_tests.support.dev_processes import find, find_url, running_dev, wait_until
from fhir_assets_tests.support.shipped_views import views_of_type
from fhir_assets_tests.support.views import load, patient

streamlit = pytest.importorskip("streamlit", reason="Streamlit is in the environment of make dbt-story")
testing = pytest.importorskip("streamlit.testing.v1")
pytestmark = pytest.mark.slow

MISSING = find_missing_programs()
APP = Path(fhir_assets.__file__).parent / "dashboard" / "app.py"
HEADINGS = ["Population", "Current conditions", "Encounters a month", "Laboratory results", "Completeness", "Freshness"]


@pytest.fixture(autouse=True)
def _no_cached_answers() -> None:
    streamlit.cache_data.clear()


@pytest.fixture
def loaded(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database with six patients, which the settings name."""
    monkeypatch.setenv("DB_URL", database)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        people = [patient(f"p{n}", gender="male", birthDate="1900", name=[{"family": "Marker"}]) for n in range(6)]
        load(conn, *people, views=tuple(views_of_type("Patient")))
    return database


def test_the_page_shows_counts_and_says_what_is_not_loaded(loaded: str) -> None:
    page = testing.AppTest.from_file(str(APP), default_timeout=60).run()
    assert [error.value for error in page.exception] == []
    assert [error.value for error in page.error] == []
    assert [heading.value for heading in page.header] == HEADINGS
    assert len(page.info) == 3, "conditions, encounters and results"
    assert [text.value for text in page.markdown] == []
    assert page.caption[1].value == "This page reads the database as fhir_reader, which may read tables only."
    tables = [table.value.to_dict("records") for table in page.dataframe]
    assert tables[0][0] == {"table": "patient", "rows": 6, "column": "birth_date", "stated": 6, "share": "100%"}
    assert (tables[1][0]["type"], tables[1][0]["resources"]) == ("Patient", 6)
    assert "Marker" not in str(tables)


def test_an_unreachable_database_is_a_sentence_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_URL", "postgresql://nobody:secret@127.0.0.1:1/none")
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    page = testing.AppTest.from_file(str(APP), default_timeout=60).run()
    [error] = page.error
    assert "127.0.0.1:1" in error.value
    assert "secret" not in error.value


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Run `fhir-assets dashboard` on a free port. Yield its URL and its process."""
    port = find_free_port()
    program = "from fhir_assets.cli.main import main; main()"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "dashboard", "--port", str(port)],
            env={**os.environ, "HOME": str(folder)},
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        assert wait_for(f"{url}/_stcore/health") == "ok", (folder / "log").read_text()
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def test_the_command_listens_on_loopback_only(loaded: str, tmp_path: Path) -> None:
    with served(tmp_path) as (_, process):
        connections = process.net_connections("inet")
        listening = {item.laddr.ip for item in connections if item.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


@pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}: `apt-get install chromium chromium-driver`, as .ci/run does")
def test_a_browser_shows_the_page_that_the_command_serves(loaded: str, tmp_path: Path) -> None:
    with served(tmp_path) as (url, _), open_browser(tmp_path) as browser:
        browser.open(url)
        browser.wait_for("What the tables hold[^$]*Population[^$]*90 and older[^$]*Freshness", seconds=60)


@pytest.fixture
def dev_urls(loaded: str) -> dict[str, str]:
    return {"DB_URL": loaded, "DAGSTER_POSTGRES_URL": normalise_url(loaded, "psycopg2")}


def find_dashboard(text: Callable[[], str]) -> str:
    """Return the URL of the dashboard that `fhir-assets dev` prints."""
    wait_until(lambda: "Dashboard: " in text(), text())
    return str(re.findall(r"Dashboard: (http://127\.0\.0\.1:\d+) ", text())[0])


def test_dev_serves_the_dashboard_on_a_free_port_and_restarts_it(dev_urls: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running_dev(tmp_path, "--dashboard-port", str(port), **dev_urls) as (process, text):
            url = find_dashboard(text)
            assert not url.endswith(f":{port}")
            assert find_url(text) != url
            assert "it reads the database as fhir_reader" in text()
            assert wait_for(f"{url}/_stcore/health") == "ok", text()
            dev = psutil.Process(process.pid)
            dashboard = find(dev, tmp_path / "home", "streamlit run")
            assert dashboard is not None
            listening = [item for item in dashboard.net_connections("inet") if item.status == psutil.CONN_LISTEN]
            assert {f"http://{item.laddr.ip}:{item.laddr.port}" for item in listening} == {url}
            dashboard.kill()
            wait_until(lambda: "The dashboard (process" in text(), text())
            assert wait_for(f"{url}/_stcore/health") == "ok", text()
            assert process.poll() is None
        assert find_listeners(url) == []


def test_dev_leaves_the_dashboard_out_on_demand(dev_urls: dict[str, str], tmp_path: Path) -> None:
    with running_dev(tmp_path, "--no-dashboard", **dev_urls) as (process, text):
        find_url(text)
        assert find(psutil.Process(process.pid), tmp_path / "home", "streamlit run") is None
    assert "ashboard" not in text()


@pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}: `apt-get install chromium chromium-driver`, as .ci/run does")
def test_a_browser_shows_the_page_that_dev_serves(dev_urls: dict[str, str], tmp_path: Path) -> None:
    with running_dev(tmp_path, "--dashboard-port", str(find_free_port()), **dev_urls) as (_, text):
        url = find_dashboard(text)
        assert wait_for(f"{url}/_stcore/health") == "ok", text()
        with open_browser(tmp_path) as browser:
            browser.open(url)
            browser.wait_for("as fhir_reader[^$]*Population[^$]*90 and older[^$]*Freshness", seconds=60)


def find_listeners(url: str) -> list[psutil.Process]:
    """Return the processes that listen on the port of a URL."""
    listening = [item for item in psutil.net_connections("inet") if item.status == psutil.CONN_LISTEN]
    return [psutil.Process(item.pid) for item in listening if item.laddr and url.endswith(f":{item.laddr.port}")]


def wait_for(url: str) -> str:
    """Return the text of a page that will answer soon."""
    deadline = monotonic() + 60
    while monotonic() < deadline:
        try:
            return requests.get(url, timeout=5).text
        except requests.ConnectionError:
            sleep(0.2)
    return "no answer"
