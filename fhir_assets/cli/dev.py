"""`fhir-assets dev`: the Dagster UI and daemon, and the dashboard, on the embedded Postgres or on DB_URL."""

import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Annotated

import typer

from fhir_assets.atomic_files import replace_content
from fhir_assets.cli import dashboard
from fhir_assets.cli.local_ports import choose_port, find_free_port
from fhir_assets.cli.output import console, warn_of_clear_data
from fhir_assets.cli.supervisor import Service, Supervisor
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.command_runs import CODE_LOCATION
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db import embedded

DEFAULT_PORT = 3000

START_SECONDS = 180.0
"""Seconds in which the code server must accept connections before the UI is started without it."""

_WORKSPACE = """\
load_from:
  - grpc_server:
      host: 127.0.0.1
      port: {port}
      location_name: {name}
"""


def dev(
    port: Annotated[
        int | None, typer.Option(envvar="DAGSTER_PORT", help="Port of the UI; if it is taken, a free port is used")
    ] = None,
    with_dashboard: Annotated[
        bool, typer.Option("--dashboard/--no-dashboard", help="Serve the dashboard if its extra is installed")
    ] = True,
    dashboard_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the dashboard; if it is taken, a free port is used")
    ] = dashboard.DEFAULT_PORT,
) -> None:
    """Serve the Dagster UI and the dashboard on 127.0.0.1 and run the Dagster daemon, until Ctrl-C."""
    settings = load_settings()
    if not settings.encrypts:
        warn_of_clear_data()
    started = settings.db_url is None and not embedded.is_running(settings.home)
    try:
        serve_ui(settings, port, dashboard_port=dashboard_port if with_dashboard else None)
    finally:
        if started:
            embedded.stop(settings.home)


def serve_ui(settings: Settings, port: int | None, *, dashboard_port: int | None = dashboard.DEFAULT_PORT) -> None:
    """Run the code server, the UI and the daemon until interrupted, and restart each of them that exits.

    If the extra `dashboard` is installed, the dashboard runs too, unless ``dashboard_port`` is None.
    With API_TOKENS the post loader runs too, because `fhir-assets api` can be started alongside this command.
    The embedded Postgres, if it is used, is restarted too. The default of ``port`` is DEFAULT_PORT. Raises
    ConfigurationError if a process exits repeatedly after its start.
    """
    Warehouse(settings).url()
    environment = {**config.build_environment(settings), "DAGSTER_IS_DEV_CLI": "1"}
    config.require_dagster_database(environment["DAGSTER_POSTGRES_URL"])
    port = choose_port(port or DEFAULT_PORT)
    supervisor = Supervisor(environment, _report)
    previous = {sign: signal.signal(sign, _interrupt) for sign in (signal.SIGINT, signal.SIGTERM)}
    with TemporaryDirectory(prefix="fhir_assets_dev_") as folder:
        try:
            _start_services(supervisor, Path(folder), port)
            if settings.api_tokens:
                post_loader = [sys.executable, "-c", "from fhir_assets.cli import main; main()", "post-loader"]
                supervisor.start(Service("The post loader", post_loader))
            console.print(f"Dagster UI: [bold]http://127.0.0.1:{port}[/bold]  (Ctrl-C stops it)")
            if dashboard_port is not None and dashboard.is_installed():
                _start_dashboard(supervisor, settings, dashboard_port)
            supervisor.run(*([] if settings.db_url else [lambda: _keep_postgres(settings)]))
        except KeyboardInterrupt:
            pass
        finally:
            for sign in previous:
                signal.signal(sign, signal.SIG_IGN)
            supervisor.stop()
            for sign, handler in previous.items():
                signal.signal(sign, handler)


def _start_services(supervisor: Supervisor, folder: Path, port: int) -> None:
    """Start the processes of `dagster dev`, with a code server that does not exit by itself.

    The code server that `dagster dev` starts exits if a busy machine delays its heartbeats, and is not restarted.
    """
    code_port = find_free_port()
    workspace = folder / "workspace.yaml"
    replace_content(workspace, _WORKSPACE.format(port=code_port, name=CODE_LOCATION).encode())
    python, quiet = [sys.executable, "-m"], ["--log-level", "error"]
    where = ["--host", "127.0.0.1", "--port"]
    code = [*python, "dagster", "code-server", "start", *where, str(code_port), *quiet, "--heartbeat-ttl", "600"]
    code += ["--module-name", "fhir_assets.definitions", "--location-name", CODE_LOCATION]
    supervisor.start(Service("The code server", code, needs_child=True))
    _wait_for_port(supervisor, code_port)
    webserver = [*python, "dagster_webserver", *where, str(port), "--workspace", str(workspace)]
    supervisor.start(Service("The UI", [*webserver, "--dagster-log-level", "error", "--live-data-poll-rate", "2000"]))
    daemon = [*python, "dagster._daemon", "run", "--workspace", str(workspace), *quiet]
    supervisor.start(Service("The daemon", daemon))


def _start_dashboard(supervisor: Supervisor, settings: Settings, port: int) -> None:
    """Start the dashboard, without which the other processes go on, and print its URL."""
    port, rights = choose_port(port), dashboard.describe_rights(settings)
    supervisor.start(Service("The dashboard", dashboard.build_command(port), optional=True))
    console.print(
        f"Dashboard: [bold]http://127.0.0.1:{port}[/bold]  (counts only; it reads the database {rights})",
        soft_wrap=True,
    )


def _wait_for_port(supervisor: Supervisor, port: int) -> None:
    """Wait until a process accepts connections at the port, at most START_SECONDS."""
    deadline = monotonic() + START_SECONDS
    while monotonic() < deadline:
        supervisor.check()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        sleep(0.2)


def _keep_postgres(settings: Settings) -> None:
    """Restart the embedded Postgres if it has exited."""
    if not (embedded.is_running(settings.home) or embedded.is_running(settings.home)):
        _report("The embedded Postgres does not answer: restarting it")
        embedded.ensure(settings.home, port=settings.fhir_postgres_port)


def _report(message: str) -> None:
    console.print(message, markup=False, soft_wrap=True)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
