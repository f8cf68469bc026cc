"""A headless Chromium, driven through Debian's chromedriver (https://www.w3.org/TR/webdriver2/)."""

import base64
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

ENTER = "\ue007"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1600,1000"]
_POLL_SECONDS = 0.3


def find_missing_programs() -> str:
    """Return the names of the programs that a browser needs and that are not installed; empty if there are none."""
    return ", ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


class Browser:
    """One window. Methods wait until what they look for is on the page, at most ``seconds``."""

    def __init__(self, session_url: str, *, seconds: float = 30) -> None:
        self._url = session_url
        self._seconds = seconds

    def open(self, url: str) -> None:
        """Load a page."""
        self._call("POST", "url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """Run JavaScript and return its result."""
        return self._call("POST", "execute/sync", {"script": script, "args": list(arguments)})

    @property
    def text(self) -> str:
        """What a person can read on the page."""
        return str(self.run("return document.body.innerText"))

    def wait_for(self, pattern: str, *, seconds: float | None = None, reload_every: float | None = None) -> str:
        """Wait until the text of the page matches a regular expression, and return the match.

        With ``reload_every`` the page is loaded again after so many seconds. Fails with the text of the page.
        """
        end = time.monotonic() + (seconds or self._seconds)
        reloaded = time.monotonic()
        while True:
            text = self.text
            if found := re.search(pattern, text):
                return found.group(0)
            if time.monotonic() > end:
                raise AssertionError(f"the page does not say {pattern!r} but:\n{text[:4000]}")
            if reload_every is not None and time.monotonic() - reloaded > reload_every:
                self._call("POST", "refresh", {})
                reloaded = time.monotonic()
            time.sleep(_POLL_SECONDS)

    def click(self, xpath: str, *, seconds: float | None = None) -> None:
        """Click the first element that a person can see and that is not disabled."""
        end = time.monotonic() + (seconds or self._seconds)
        while True:
            for element in self._find_all(xpath):
                try:
                    if self._call("GET", f"element/{element}/displayed") and self._call(
                        "GET", f"element/{element}/enabled"
                    ):
                        self._call("POST", f"element/{element}/click", {})
                        return
                except _Refused:
                    continue
            if time.monotonic() > end:
                raise AssertionError(f"nothing to click at {xpath}; the page says:\n{self.text[:4000]}")
            time.sleep(_POLL_SECONDS)

    def click_text(self, text: str, *, tag: str = "*", seconds: float | None = None) -> None:
        """Click the innermost element whose text is ``text``."""
        self.click(f"//{tag}[normalize-space(.)='{text}'][not(.//{tag}[normalize-space(.)='{text}'])]", seconds=seconds)

    def type(self, xpath: str, text: str) -> None:
        """Type into the first element."""
        end = time.monotonic() + self._seconds
        while not (elements := self._find_all(xpath)):
            if time.monotonic() > end:
                raise AssertionError(f"nothing to type into at {xpath}; the page says:\n{self.text[:4000]}")
            time.sleep(_POLL_SECONDS)
        self._call("POST", f"element/{elements[0]}/value", {"text": text})

    def take_screenshot(self, path: Path) -> None:
        """Write the window as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(str(self._call("GET", "screenshot"))))

    def _find_all(self, xpath: str) -> list[str]:
        found = self._call("POST", "elements", {"using": "xpath", "value": xpath})
        return [element[_ELEMENT] for element in found]

    def _call(self, method: str, path: str, body: object = None) -> Any:
        response = requests.request(method, f"{self._url}/{path}", json=body, timeout=120)
        value = response.json()["value"]
        if response.status_code != 200:
            raise _Refused(f"{method} {path}: {value['error']}: {value['message']}")
        return value


class _Refused(Exception):
    """WebDriver could not carry out a command, for example because the page has changed since."""


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Open a browser whose profile is in ``folder``. Close it at the end of the block."""
    process = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        port = next(
            found.group(1) for line in process.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        options = {"binary": shutil.which("chromium"), "args": [*_ARGUMENTS, f"--user-data-dir={folder}"]}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        root = f"http://127.0.0.1:{port}/session"
        answer = requests.post(root, json={"capabilities": capabilities}, timeout=120).json()["value"]
        session_url = f"{root}/{answer['sessionId']}"
        try:
            yield Browser(session_url)
        finally:
            requests.delete(session_url, timeout=60)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()
