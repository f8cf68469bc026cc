"""The dashboard as Streamlit runs it, and as `fhir-assets dashboard` serves it.

Streamlit is in the environment of `make dbt-story`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import requests

import fhir_assets
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.api import free_port
from fhir_assets_tests.support.browser import find_missing_programs, open_browser
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
    port = free_port()
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


def wait_for(url: str) -> str:
    """Return the text of a page that will answer soon."""
    deadline = monotonic() + 60
    while monotonic() < deadline:
        try:
            return requests.get(url, timeout=5).text
        except requests.ConnectionError:
            sleep(0.2)
    return "no answer"
