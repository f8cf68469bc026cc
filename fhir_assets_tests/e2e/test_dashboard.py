"""The dashboard as Streamlit runs it, and as `fhir-assets dashboard` serves it.

Streamlit is in the environment of `make dbt-story`.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import requests

import fhir_assets
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.browser import find_missing_programs, open_browser
from fhir_assets_tests.support.shipped_views import views_of_type
from fhir_assets_tests.support.views import load, patient

streamlit = pytest.importorskip("streamlit", reason="Streamlit is in the environment of make dbt-story")
testing = pytest.importorskip("streamlit.testing.v1")
pytestmark = pytest.mark.slow

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


def test_the_command_serves_the_page_on_loopback_until_it_is_stopped(loaded: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = "from fhir_assets.cli.main import main; main()"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "dashboard", "--port", str(port)],
            env={**os.environ, "HOME": str(tmp_path)},
            stdout=log,
            stderr=log,
            cwd=tmp_path,
        )
    try:
        assert wait_for(f"http://127.0.0.1:{port}/_stcore/health") == "ok", (tmp_path / "log").read_text()
        listening = {
            item.laddr.ip
            for item in psutil.Process(process.pid).net_connections("inet")
            if item.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        if find_missing_programs():
            pytest.skip(f"not installed: {find_missing_programs()}")
        with open_browser(tmp_path) as browser:
            browser.open(f"http://127.0.0.1:{port}")
            browser.wait_for("What the tables hold[^$]*Population[^$]*90 and older[^$]*Freshness", seconds=60)
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str) -> str:
    """Return the text of a page that will answer soon."""
    deadline = monotonic() + 60
    while monotonic() < deadline:
        try:
            return requests.get(url, timeout=5).text
        except requests.ConnectionError:
            sleep(0.2)
    return "no answer"
