"""`fhir-assets dashboard`: a page with counts of the tables, served by Streamlit."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import fhir_assets
from fhir_assets.cli.output import console
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import Settings, load_settings
from fhir_assets.warehouse.postgres.db import roles

DEFAULT_PORT = 8501

_APP = Path(fhir_assets.__file__).parent / "dashboard" / "app.py"
_HOST = "127.0.0.1"


def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the page")] = DEFAULT_PORT,
) -> None:
    """Serve a page on 127.0.0.1 with population, conditions, encounters, results, completeness and freshness.

    It shows counts, no patient, and leaves out groups of fewer than 5 patients. It needs the extra `dashboard`, and
    runs until Ctrl-C. `fhir-assets dev` serves it, too.
    """
    if not is_installed():
        raise ConfigurationError("Streamlit is not installed: run `pip install fhir-assets[dashboard]`")
    console.print(f"The page reads the database {describe_rights(load_settings())}", markup=False, soft_wrap=True)
    # Streamlit replaces this process, so that it receives the signals.
    command = build_command(port)
    os.execv(command[0], command)


def is_installed() -> bool:
    """Return whether the extra `dashboard` is installed, without importing it."""
    return importlib.util.find_spec("streamlit") is not None


def describe_rights(settings: Settings) -> str:
    """Return with which rights the page reads the database, to follow "reads". Raises as `connect_as_reader` does."""
    with Warehouse(settings).connect_as_reader() as conn:
        return roles.describe_reader(conn)


def build_command(port: int) -> list[str]:
    """Return the command that serves the page at a port of 127.0.0.1."""
    options = {
        "server.address": _HOST,
        "server.port": str(port),
        "server.headless": "true",
        "browser.gatherUsageStats": "false",
        "runner.magicEnabled": "false",
        "client.showErrorDetails": "none",
        "client.toolbarMode": "minimal",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "streamlit", "run", str(_APP), *arguments]
