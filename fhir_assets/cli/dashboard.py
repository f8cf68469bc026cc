"""`fhir-assets dashboard`: a page with counts of the tables, served by Streamlit."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import fhir_assets
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.settings import load_settings

_APP = Path(fhir_assets.__file__).parent / "dashboard" / "app.py"
_HOST = "127.0.0.1"


def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the page")] = 8501,
) -> None:
    """Serve a page on 127.0.0.1 with population, conditions, encounters, results, completeness and freshness.

    It shows counts, no patient, and leaves out groups of fewer than 5 patients. It needs the extra `dashboard`, and
    runs until Ctrl-C.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise ConfigurationError("Streamlit is not installed: run `pip install fhir-assets[dashboard]`")
    Warehouse(load_settings()).connect_read_only().close()
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
    # Streamlit replaces this process, so that it receives the signals.
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(_APP), *arguments])
