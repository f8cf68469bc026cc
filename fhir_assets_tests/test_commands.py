"""A command imports only what it needs, and the list of commands says of each what its own help says."""

import os
from pathlib import Path
from typing import Any

import pytest
import typer
from alembic.config import Config
from alembic.script import ScriptDirectory
from typer.main import get_command
from typer.testing import CliRunner

from fhir_assets.cli import dead_letters
from fhir_assets.cli.commands import COMMANDS
from fhir_assets.cli.lazy_commands import LazyCommand
from fhir_assets.cli.main import app as main_app
from fhir_assets.warehouse.postgres.db import schema_state
from fhir_assets_tests.support.imported_modules import list_imported_modules

DATABASE = {"psycopg", "psycopg_pool", "cryptography"}
DAGSTER = {"dagster", "dagster_postgres", "sqlalchemy", "alembic"}
PIPELINE = DAGSTER | {"requests", "fastapi", "jsonschema", "joserfc"}
FILES = "patient.json"


@pytest.mark.parametrize(
    ("arguments", "unneeded", "at_most"),
    [
        (["--help"], PIPELINE | DATABASE | {"pydantic", "msgspec"}, 420),
        (["runs", "list"], PIPELINE | {"msgspec"}, 800),
        (["dead-letters", "list"], PIPELINE, 850),
        (["audit", "list"], PIPELINE, 850),
        (["validate", FILES], PIPELINE | DATABASE, 750),
        (["ingest", "--help"], DAGSTER | {"fastapi", "uvicorn", "celery", "pyarrow", "fhirpathpy", "boto3"}, 1200),
        (["view", "run", str(schema_state.sql_folder() / "views" / "patient.json"), FILES], PIPELINE, 850),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else "",
)
def test_a_command_imports_what_it_needs(
    tmp_path: Path, database: str, arguments: list[str], unneeded: set[str], at_most: int
) -> None:
    (tmp_path / FILES).write_text('{"resourceType":"Patient","id":"p1"}')
    environment = {**os.environ, "DB_URL": database, "FHIR_ASSETS_HOME": str(tmp_path)}
    modules = list_imported_modules(environment, tmp_path, *arguments)
    assert modules & unneeded == set()
    assert len(modules) <= at_most


@pytest.mark.parametrize("app", [main_app, dead_letters.app])
def test_the_list_of_commands_says_what_each_command_says_of_itself(app: typer.Typer) -> None:
    group: Any = get_command(app)
    lazy = {name: command for name, command in group.commands.items() if isinstance(command, LazyCommand)}
    assert lazy
    own = {name: " ".join((command.load().help or "").split("\n\n")[0].split()) for name, command in lazy.items()}
    assert {name: command.help for name, command in lazy.items()} == own


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_help(name: str) -> None:
    result = CliRunner().invoke(main_app, [name, "--help"])
    assert result.exit_code == 0
    assert f"fhir-assets {name}" in result.output.replace("root ", "fhir-assets ")


def test_the_revisions_that_are_read_from_the_files_are_those_of_alembic() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema_state.sql_folder() / "migrations"))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    read = schema_state.read_scripts()
    assert read.head == scripts.get_current_head()
    assert read.known == {script.revision for script in scripts.walk_revisions()}
