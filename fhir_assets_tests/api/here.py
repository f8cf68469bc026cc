"""The API in a thread of this process, over a real socket: what a test wants to look into, or to start fast."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from time import sleep

import uvicorn

from fhir_assets.api.app import create_app
from fhir_assets.settings import Settings
from fhir_assets_tests.api.conftest import Api


@contextmanager
def served(settings: Settings) -> Iterator[Api]:
    """A running API."""
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, name="api", daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Api(f"http://127.0.0.1:{port}", settings, Path("/dev/null"))
    finally:
        server.should_exit = True
        thread.join(30)
