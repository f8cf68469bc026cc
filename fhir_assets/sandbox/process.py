"""Runs the sandbox server in this process, in a thread (for tests), or in a subprocess."""

import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, Unpack, cast

import requests
import uvicorn
from fastapi import FastAPI

from fhir_assets.connection_limits import LimitedProtocol
from fhir_assets.errors import ConfigurationError, ServerUnavailable
from fhir_assets.sandbox.dates import to_microseconds
from fhir_assets.sandbox.fault_injection import CLOSE_SOCKET
from fhir_assets.sandbox.faults import Fault, FaultPlan
from fhir_assets.sandbox.memory import Store, read_lines
from fhir_assets.sandbox.server import BASE, Options, create_app

_READY = "Sandbox FHIR server: "


class _Protocol(LimitedProtocol):
    """uvicorn's HTTP protocol with an extension that closes the socket without a response."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, Any] = {CLOSE_SOCKET: self.transport.abort}
        self.scope["extensions"] = extensions


def fill_store(store: Store, data: Path | Iterable[bytes] | None) -> None:
    """Fill a store from a folder of NDJSON files, or from resources as JSON. ``data`` None adds nothing.

    Raises ConfigurationError for a folder without NDJSON files, and for a line that is not a resource with an id.
    """
    if data is None:
        return
    arrived = to_microseconds(datetime.now(UTC)) // 1000 * 1000
    for n, body in enumerate(read_lines(data) if isinstance(data, Path) else data, 1):
        try:
            store.seed(body, arrived)
        except ValueError:
            raise ConfigurationError(
                f"Resource {n} of the sandbox's data is not JSON with a resourceType, an id and a FHIR "
                "meta.lastUpdated: remove it from the data"
            ) from None


def _listen(port: int, host: str = "127.0.0.1") -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"The sandbox cannot listen on {host}:{port} ({error.strerror}): pass another --port, or 0 for a free port"
        ) from None
    listener.listen(2048)
    return listener


def _uvicorn(app: FastAPI) -> uvicorn.Server:
    """Return a uvicorn server without logs, because request lines contain search values."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


class _ServerControls:
    """The methods that control a running server over HTTP (``/_sandbox``)."""

    url: str
    """The FHIR base URL, such as ``http://127.0.0.1:8090/fhir``."""

    def set_faults(self, *faults: Fault, seed: int = 0) -> None:
        """Replace the faults of the server."""
        plan = FaultPlan(faults=faults, seed=seed)
        requests.put(self._control_url("faults"), data=plan.model_dump_json(), timeout=10).raise_for_status()

    def stats(self) -> dict[str, Any]:
        """Return the statistics of the server.

        They are ``requests`` by kind, ``statuses``, ``struck`` faults, ``max_in_flight``, ``kick_offs``, ``recent``
        request lines and live ``resources`` by type.
        """
        return cast("dict[str, Any]", requests.get(self._control_url("stats"), timeout=10).json())

    def reset_stats(self) -> None:
        """Reset the statistics."""
        requests.delete(self._control_url("stats"), timeout=10).raise_for_status()

    def _control_url(self, name: str) -> str:
        return f"{self.url.removesuffix(BASE)}/_sandbox/{name}"


class SandboxServer(_ServerControls):
    """A sandbox server in a thread, on a free port: ``with SandboxServer(data) as server: server.url``.

    ``data`` is a folder of NDJSON files, or resources as JSON; ``options`` are passed to ``create_app``.
    """

    def __init__(
        self,
        data: Path | Iterable[bytes] | None = None,
        *,
        faults: tuple[Fault, ...] = (),
        seed: int = 0,
        port: int = 0,
        **options: Unpack[Options],
    ) -> None:
        self.store = Store()
        fill_store(self.store, data)
        app = create_app(self.store, FaultPlan(faults=faults, seed=seed), **options)
        self._listener = _listen(port)
        self._server = _uvicorn(app)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}{BASE}"
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listener]}, name="sandbox", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()


class SandboxProcess(_ServerControls):
    """A sandbox server in a subprocess that ends with this process. If ``data`` is None, the server is empty."""

    def __init__(self, data: Path | None = None, *, port: int = 0, options: tuple[str, ...] = ()) -> None:
        source = ("--empty",) if data is None else ("--data", str(data))
        self._command = [
            sys.executable,
            "-m",
            "fhir_assets.sandbox",
            *source,
            *("--port", str(port), "--end-with-stdin"),
            *options,
        ]

    def __enter__(self) -> Self:
        # Errors go to a file: a pipe that nobody reads stops the server when it is full.
        with tempfile.TemporaryFile("w+") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line.startswith(_READY):
                self._process.communicate()
                log.seek(0)
                raise ServerUnavailable(f"The sandbox server did not start: {log.read().strip()[-500:]}")
        self.url = line.removeprefix(_READY).strip()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid


def serve(
    data: Path | None,
    port: int = 0,
    faults: FaultPlan | None = None,
    *,
    end_with_stdin: bool = False,
    ready: Callable[[str], None] | None = None,
    **options: Unpack[Options],
) -> None:
    """Serve until Ctrl-C or SIGTERM, and with ``end_with_stdin`` until standard input is closed.

    Call it from the main thread. ``data`` is a folder of NDJSON files, or None for an empty server. ``ready`` receives
    the URL; by default it is written to standard output. Raises ConfigurationError for unusable data or a port in use.
    """
    with suppress(KeyboardInterrupt), _listen(port) as listener:
        store = Store()
        fill_store(store, data)
        server = _uvicorn(create_app(store, faults, **options))
        _end_with_signals(server)
        if end_with_stdin:
            threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
        (ready or _print_url)(f"http://127.0.0.1:{listener.getsockname()[1]}{BASE}")
        server.run(sockets=[listener])


def _print_url(url: str) -> None:
    sys.stdout.write(f"{_READY}{url}\n")
    sys.stdout.flush()


def _end_with_signals(server: uvicorn.Server) -> None:
    """End the server at SIGINT and SIGTERM, including those that arrive before uvicorn installs its own handlers."""

    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _end_with_stdin(server: uvicorn.Server) -> None:
    sys.stdin.read()
    server.should_exit = True
