"""Measure two pages of the Dagster UI in a headless Chromium: that of a backfill, and that of a run of many windows.

``python -m benchmarks.backfill --page`` calls this module.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import requests

from fhir_assets.cli.local_ports import find_free_port
from fhir_assets_tests.support.browser import Browser, open_browser

LIMIT_SECONDS = 5.0
_ROUNDS = 5
_START_SECONDS = 300.0
_PAGE_SECONDS = 180.0
_POLL_SECONDS = 0.05


def measure_pages(home: Path, pages: Mapping[str, tuple[str, str]]) -> bool:
    """Print the seconds until each page shows its content. Return whether the slowest median is below the limit.

    ``pages`` are path and regular expression by title: the content is there when the text of the page matches. The
    first time that a page is opened, the browser also loads the UI's code, which it then has.
    """
    medians = []
    with _serve_ui(home) as url, open_browser(home / "profile") as browser:
        for title, (path, pattern) in pages.items():
            seconds = [_time_page(browser, f"{url}{path}", pattern) for _ in range(_ROUNDS)]
            medians.append(sorted(seconds)[_ROUNDS // 2])
            shown = ", ".join(f"{value:.1f}" for value in seconds)
            print(f"{title}: {shown} s at load {os.getloadavg()[0]:.1f} (limit {LIMIT_SECONDS:.0f} s)", flush=True)
    return max(medians) < LIMIT_SECONDS


def _time_page(browser: Browser, url: str, pattern: str) -> float:
    browser.open("about:blank")
    started = perf_counter()
    browser.open(url)
    _wait(
        lambda: bool(browser.run("return new RegExp(arguments[0]).test(document.body.innerText)", pattern)),
        _PAGE_SECONDS,
        lambda: f"the page {url} does not say {pattern!r} but:\n{browser.text[:4000]}",
    )
    return perf_counter() - started


@contextmanager
def _serve_ui(home: Path) -> Iterator[str]:
    """Run the webserver with its code server during the block, and yield its address."""
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "dagster_webserver", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (home / "webserver.log").open("wb") as log,
        subprocess.Popen(
            [*command, "--module-name", "fhir_assets.definitions"], cwd=home, stdout=log, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            _wait(lambda: _answers(url), _START_SECONDS, lambda: "the UI does not start")
            yield url
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/server_info", timeout=5).ok
    except requests.RequestException:
        return False


def _wait(condition: Callable[[], bool], seconds: float, describe: Callable[[], str]) -> None:
    deadline = perf_counter() + seconds
    while not condition():
        if perf_counter() > deadline:
            raise SystemExit(describe())
        time.sleep(_POLL_SECONDS)
