"""The command line `fhir-assets`. Each module holds one command or one group of commands.

Commands parse options, call ``pipeline``, ``delivery`` or ``warehouse``, and print; SQL and business rules do not
belong here.
"""

from fhir_assets.cli.main import main

__all__ = ["main"]
