"""Databases of every past schema are upgraded to the catalog of a new database."""

import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy
from alembic import command
from alembic.config import Config
from psycopg import sql

from fhir_assets.warehouse.postgres.db import migrations, schema_state
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url, with_database
from fhir_assets_tests.support.catalogs import read_catalog

EVERY = 7
"""How many revisions apart the tested ones are. Set it to 1 after a change of the runner of migrations: minutes."""

Text = tuple[str, str]
EARLIER_TEXTS: dict[str, tuple[str, list[Text]]] = {
    "0001_first": ("0001", [("        CREATE INDEX ON ops.dead_letters (resource_type, status, rule, id);\n", "")]),
    "0004_replays": (
        "0008",
        [
            ("            sealed_by text,\n            corrected_by", "            corrected_by"),
            (
                "        DROP INDEX ops.dead_letters_resource_type_id_idx",
                "        CREATE INDEX ON ops.dead_letters (marked_at) WHERE status = 'replaying';\n"
                "        CREATE INDEX ON ops.dead_letters (claimed_by) WHERE status = 'replaying';\n"
                "        DROP INDEX ops.dead_letters_resource_type_id_idx",
            ),
        ],
    ),
}
"""What earlier texts of a migration had in place of the text of today, and a revision that databases had with them."""


def upgrade_to(url: str, revision: str, folder: Path) -> None:
    """Upgrade a database to a revision with the migrations of a folder, as earlier versions did."""
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    engine = sqlalchemy.create_engine(normalise_url(url, "psycopg"), poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE SCHEMA IF NOT EXISTS ops"))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


@pytest.mark.parametrize("name", EARLIER_TEXTS)
def test_a_database_of_an_earlier_text_of_a_migration_is_upgraded(
    name: str, empty_database: str, database: str, tmp_path: Path
) -> None:
    folder = tmp_path / "migrations"
    shutil.copytree(schema_state.sql_folder() / "migrations", folder)
    file = folder / "versions" / f"{name}.py"
    text = file.read_text()
    revision, changes = EARLIER_TEXTS[name]
    for now, then in changes:
        assert now in text
        text = text.replace(now, then)
    file.write_text(text)
    upgrade_to(empty_database, revision, folder)
    migrations.upgrade(empty_database)
    assert read_catalog(empty_database) == read_catalog(database)


@pytest.mark.slow
def test_a_database_of_a_past_revision_gets_the_catalog_of_a_new_one(empty_database: str, database: str) -> None:
    wanted = read_catalog(database)
    folder = schema_state.sql_folder() / "migrations"
    copy = "past_revision"
    server = with_database(empty_database, "postgres")
    chain = urlsplit(empty_database).path.lstrip("/")
    revisions = sorted(schema_state.read_scripts().known - {schema_state.read_scripts().head})
    for revision in [*revisions[::EVERY], revisions[-1]]:
        upgrade_to(empty_database, revision, folder)
        with connect(server, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(copy)))
            conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(copy), sql.Identifier(chain)))
        url = with_database(empty_database, copy)
        migrations.upgrade(url)
        assert read_catalog(url) == wanted, f"revision {revision}"
    with connect(server, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(copy)))
