"""The modules that a command imports, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_PROGRAM = """
import json, sys
from fhir_assets.cli import main
try:
    main()
except SystemExit as end:
    print(json.dumps({"exit": end.code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""


def list_imported_modules(environment: Mapping[str, str], folder: Path, *arguments: str) -> set[str]:
    """Run a command in ``folder`` and return the modules that it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], env=environment, cwd=folder, capture_output=True, text=True
    )
    facts = json.loads(done.stderr.splitlines()[-1])
    assert facts["exit"] in (0, None), done.stderr[-2000:]
    return set(facts["modules"])
