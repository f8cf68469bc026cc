"""`fhir-assets dev`: the Dagster UI and daemon, on the embedded Postgres or on DB_URL."""

import os
import signal
import socket
import subprocess
import sys
from typing import Annotated

import typer

from fhir_assets.cli.output import console, warn_of_clear_data
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db import embedded

DEFAULT_PORT = 3000

_SUPERSEDED = "ignore:Function `dev_command`"
"""Filter for the warning in which `dagster dev` recommends `dg dev`, which this project does not use."""


def dev(
    port: Annotated[
        int | None, typer.Option(envvar="DAGSTER_PORT", help="Port of the UI; if it is taken, a free port is used")
    ] = None,
) -> None:
    """Serve the Dagster UI on 127.0.0.1 and run the Dagster daemon, until Ctrl-C."""
    settings = load_settings()
    if not settings.encrypts:
        warn_of_clear_data()
    started = settings.db_url is None and not embedded.is_running(settings.home)
    try:
        serve_ui(settings, port)
    finally:
        if started:
            embedded.stop(settings.home)


def serve_ui(settings: Settings, port: int | None) -> None:
    """Run ``dagster dev`` until it ends or is interrupted, then stop all of its processes.

    ``port`` is DEFAULT_PORT if None. Raises ConfigurationError if ``dagster dev`` fails.
    """
    Warehouse(settings).url()
    environment = {**config.build_environment(settings), "PYTHONWARNINGS": _SUPERSEDED}
    port = free_port(port or DEFAULT_PORT)
    console.print(f"Dagster UI: [bold]http://127.0.0.1:{port}[/bold]  (Ctrl-C stops it)")
    command = [sys.executable, "-m", "dagster", "dev", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workspace", str(config.find_workspace_yaml()), "--log-level", "error"]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    previous = {sign: signal.signal(sign, _interrupt) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = 0
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)
        _stop(process)
    if code:
        raise ConfigurationError(f"dagster dev ended with exit code {code}: its messages are above")


def free_port(wanted: int) -> int:
    """Return ``wanted`` if no process listens on it, else a free port of 127.0.0.1. Raises ConfigurationError."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigurationError("127.0.0.1 has no free port: stop a server, or set DAGSTER_PORT")


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the process and its children: with SIGINT, then SIGTERM, then SIGKILL."""
    for sign, seconds in ((signal.SIGINT, 15), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
