"""Checksums of applied migrations: a file that was changed after a database was made with it is found."""

import hashlib
from collections.abc import Mapping
from functools import cache

from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.db.schema_state import read_migration_files


@cache
def compute_checksums() -> Mapping[str, str]:
    """Return the checksum of each migration of this version, by revision. The ends of lines do not matter."""
    return {
        revision: hashlib.sha256("\n".join(text.splitlines()).encode()).hexdigest()
        for revision, text in read_migration_files().items()
    }


def require_unchanged(conn: Connection) -> None:
    """Compare the recorded checksums with the files. Databases of earlier versions have no checksums yet.

    Raises ConfigurationError, which names the migrations whose files differ.
    """
    table = conn.execute("SELECT to_regclass('ops.migration_checksums')").fetchone()
    if table is None or table[0] is None:
        return
    recorded: dict[str, str] = dict(
        conn.execute(
            """
            SELECT revision, checksum
            FROM ops.migration_checksums
            """
        ).fetchall()
    )
    files = compute_checksums()
    changed = sorted(name for name, checksum in recorded.items() if files.get(name, checksum) != checksum)
    if changed:
        raise ConfigurationError(
            f"The files of sql/migrations/versions for {', '.join(changed)} are not those with which this database was "
            "made: restore them from the release, and put changes of the schema into a new migration. If the schema is "
            "known to be right, delete these revisions from ops.migration_checksums, then run `fhir-assets migrate`"
        )


def record(conn: Connection) -> None:
    """Record the checksums of all migrations that have none, after an upgrade to the newest revision."""
    checksums = compute_checksums()
    conn.execute(
        """
        INSERT INTO ops.migration_checksums (revision, checksum)
        SELECT * FROM unnest(%s::text[], %s::text[])
        ON CONFLICT (revision) DO NOTHING
        """,
        [list(checksums), list(checksums.values())],
    )
