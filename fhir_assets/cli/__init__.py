"""`fhir-assets`, the one command: a module a group of commands."""

from fhir_assets.cli.main import main

__all__ = ["main"]
