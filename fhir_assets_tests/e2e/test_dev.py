"""`fhir-assets dev` goes on if any of its processes is killed."""

import importlib.util
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil
import pytest

from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url
from fhir_assets_tests.support.databases import database_unavailable
from fhir_assets_tests.support.dev_processes import PARTS, find, find_url, is_up, running_dev, wait_until

NO_STREAMLIT = importlib.util.find_spec("streamlit") is None


@pytest.mark.skipif(not NO_STREAMLIT, reason="this is about an environment without the extra `dashboard`")
def test_dev_without_streamlit_has_no_dashboard(tmp_path: Path, database: str) -> None:
    urls = {"DB_URL": database, "DAGSTER_POSTGRES_URL": normalise_url(database, "psycopg2")}
    with running_dev(tmp_path, **urls) as (process, text):
        find_url(text)
        commands = [child.cmdline() for child in psutil.Process(process.pid).children()]
        assert process.poll() is None
    assert len(commands) == 4, "the code server, the UI, the daemon and the post loader"
    assert not [command for command in commands if "streamlit" in command]
    assert "ashboard" not in text()
    assert "Streamlit" not in text()


def says_more_often(read: Callable[[], str], words: str, times: int) -> bool:
    return read().count(words) > times


@pytest.mark.slow
def test_each_process_of_dev_comes_back_after_sigkill(tmp_path: Path) -> None:
    with running_dev(tmp_path) as (process, text):
        url = find_url(text)
        wait_until(lambda: is_up(url), text())
        dev = psutil.Process(process.pid)
        for name, pattern in PARTS.items():
            wait_until(partial(find, dev, tmp_path / "home", pattern), f"{name}: {text()}")
            victim = find(dev, tmp_path / "home", pattern)
            assert victim is not None, name
            told = text().count("restarting it")
            victim.kill()
            wait_until(partial(says_more_often, text, "restarting it", told), f"{name}: {text()}")
            wait_until(lambda: is_up(url), f"{name}: {text()}")
            assert process.poll() is None, name


@pytest.mark.slow
def test_dev_goes_on_after_an_outage_of_postgres(tmp_path: Path, postgres: str, database: str) -> None:
    dagster_url = normalise_url(database, "psycopg2")
    with running_dev(tmp_path, DB_URL=database, DAGSTER_POSTGRES_URL=dagster_url) as (process, text):
        url = find_url(text)
        wait_until(lambda: is_up(url), text())
        with database_unavailable(postgres, database):
            time.sleep(10)
        with connect(database) as conn:
            (ended,) = conn.execute("SELECT now()").fetchone() or (None,)
        wait_until(lambda: is_up(url), text())
        wait_until(partial(has_ticked, database, ended), text())
        assert process.poll() is None


def has_ticked(database: str, since: datetime) -> bool:
    """Return whether the daemon has evaluated a sensor since then."""
    with connect(database) as conn:
        row = conn.execute("SELECT max(update_timestamp) FROM job_ticks").fetchone()
    return bool(row and row[0] and row[0].replace(tzinfo=UTC) > since)
