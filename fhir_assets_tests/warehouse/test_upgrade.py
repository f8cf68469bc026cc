"""A database of revision 0019 that contains rows works after the upgrade."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from fhir_assets.fhir.views import parse_view
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.privacy.keys import new_key
from fhir_assets.warehouse.ops import bulk_exports, checkpoints, dead_letters, replays
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Selection
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db import migrations, schema_state
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.tables.layout import KEY_ID_COLUMN, build_layout
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables, find_drift
from fhir_assets_tests.support.earlier_revisions import restore_partitions
from fhir_assets_tests.support.key_rotation import open_session
from fhir_assets_tests.support.views import load, patient, select

ORDER_COLUMNS = ("arrived", "replaced_last_updated")
OLD_COLUMN_NAMES = [
    ("fhir.resource", "key_id", "sealed_by"),
    ("ops.dead_letters", "key_id", "sealed_by"),
    ("ops.corrections", "key_id", "sealed_by"),
    ("ops.idempotency", "key_id", "sealed_by"),
    ("ops.consent_records", "key_id", "sealed_by"),
    ("ops.withheld", "key_id", "sealed_by"),
    ("ops.encryption", "encrypted_at", "sealed_at"),
    ("ops.key_rotations", "current_step", "doing"),
    ("ops.dead_letters", "ruleset", "judged_by"),
    ("ops.dead_letters", "replay_requested_at", "marked_at"),
    ("ops.received", "channel", "door"),
]
NEW_COLUMNS = [
    *((table, name) for table in ("fhir.resource", "ops.withheld", "ops.consent_records") for name in ORDER_COLUMNS),
    ("ops.consent_records", "last_updated"),
    *(("fhir.resource", name) for name in ("keyless", "mentions", "identifiers")),
    *(("ops.withheld", name) for name in ("mentions", "direct", "due")),
    ("ops.consent_records", "keys"),
    ("ops.consent_policy", "subjects"),
    *(("ops.received", name) for name in ("arrivals", "posted")),
    *(("ops.landing_files", name) for name in ("posted", "encrypted_name", "key_id")),
    *(("ops.ingestion_runs", name) for name in ("older", "superseded", "seconds")),
    *(("ops.dead_letters", name) for name in ("arrived", "dated")),
    *(("ops.visit_persons", name) for name in ("name", "birth")),
    ("ops.view_tables", "key_column"),
    ("ops.view_tables", "outdated"),
]
KEYS_WITHOUT_SOURCE = {
    "fhir.resource": "resource_type, id",
    "ops.loaded_parts": "resource_type, partition_key, part",
    "ops.checkpoints": "resource_type",
    "ops.deletion_checkpoints": "resource_type",
    "ops.deletion_parts": "name",
    "ops.ingestion_runs": "run_id, resource_type, partition_key",
    "ops.corrections": "fingerprint",
    "ops.missing_references": "resource_type, resource_id",
    "ops.received": "origin, resource_type, partition_key",
    "ops.landing_files": "zone, name",
    "ops.withheld": "resource_type, id",
    "ops.consent_records": "consent_id",
    "ops.consents": "patient_id, purpose",
    "ops.consent_changes": "patient_id",
    "ops.visit_persons": "id",
    "ops.visit_persons_elsewhere": "id",
    "ops.visits": "id",
    "ops.visit_files": "origin",
    "ops.visit_posts": "task_id",
}
"""The primary keys of tables with a column ``source`` before revision 0027."""
VIEW = parse_view(
    {
        "resourceType": "ViewDefinition",
        "name": "patient",
        "status": "active",
        "resource": "Patient",
        "select": [
            {
                "column": [
                    {"name": "gender", "path": "gender", "type": "code"},
                    {
                        "name": "family",
                        "path": "name.first().family",
                        "type": "string",
                        "tag": [{"name": "phi", "value": "encrypt"}],
                    },
                ]
            }
        ],
    }
)
DEAD_LETTER = DeadLetter(
    resource_type="Patient",
    resource_id="b",
    stage="validate",
    rule="cardinality",
    path="Patient.name",
    message="is missing",
    resource=b'{"resourceType": "Patient", "id": "b"}',
    partition_key="2024-01-01",
    ruleset="rules",
)


@pytest.fixture(params=["without keys", "with keys"])
def session(request: pytest.FixtureRequest, database: str) -> Iterator[Session]:
    with open_session(database, *([new_key()] if request.param == "with keys" else [])) as session:
        yield session


def run_revision(session: Session, name: str) -> None:
    """Execute the statements of one revision again."""
    path = schema_state.sql_folder() / "migrations" / "versions" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["op"] = SimpleNamespace(execute=lambda statement: session.execute(statement.encode()))
    module.upgrade()


def restore_revision_0019(session: Session, *, encrypted: bool) -> None:
    """Give columns, indexes and the noted layout of the view's table the names that revision 0019 gives them.

    Remove the columns that were added later.
    """
    restore_partitions(session)
    session.execute("DROP VIEW fhir.deleted")
    session.execute("DROP INDEX fhir.resource_deleted")
    for table, key in KEYS_WITHOUT_SOURCE.items():
        session.execute(f"ALTER TABLE {table} DROP COLUMN source, ADD PRIMARY KEY ({key})".encode())
    session.execute("ALTER TABLE ops.dead_letters DROP COLUMN source, ADD UNIQUE (fingerprint)")
    session.execute("ALTER TABLE ops.bulk_exports DROP COLUMN source")
    session.execute("ALTER TABLE ops.consents RENAME COLUMN basis TO source")
    session.execute("ALTER TABLE IF EXISTS fhir.patient DROP COLUMN _source")
    session.execute("ALTER TABLE ops.consent_policy DROP COLUMN source")
    session.execute("ALTER TABLE ops.consent_policy ADD COLUMN one boolean PRIMARY KEY DEFAULT true")
    session.execute("DROP TABLE ops.identifier_types, ops.window_verdicts, ops.held_windows, ops.alert_cursor")
    session.execute("DROP TABLE ops.partition_rows, ops.marts, ops.numbers, ops.posted_resources, ops.record_posts")
    session.execute("DROP SCHEMA marts CASCADE")
    session.execute("ALTER TABLE fhir.resource DROP COLUMN created_at")
    session.execute("DROP FUNCTION ops.current_source()")
    session.execute("ALTER TABLE ops.dead_letters DROP COLUMN recorded, DROP COLUMN earlier_origins")
    session.execute("DROP SEQUENCE ops.dead_letter_records")
    session.execute("ALTER TABLE ops.loaded_parts DROP COLUMN views")
    for table, name in NEW_COLUMNS:
        session.execute(f"ALTER TABLE {table} DROP COLUMN {name} CASCADE".encode())
    session.execute("ALTER TABLE ops.consent_records ADD COLUMN patient_id text")
    session.execute("DROP INDEX ops.consents_patient_id_idx")
    run_revision(session, "0002_run_summary")  # creates the views that the columns above were removed from
    session.execute("DROP TABLE ops.sources, ops.deployment")
    for table, new, old in OLD_COLUMN_NAMES:
        session.execute(f"ALTER TABLE {table} RENAME COLUMN {new} TO {old}".encode())
    session.execute(
        "ALTER INDEX ops.dead_letters_stage_resource_type_ruleset_idx"
        " RENAME TO dead_letters_stage_resource_type_judged_by_idx"
    )
    session.execute("ALTER INDEX ops.incidents_unannounced RENAME TO incidents_untold")
    layout = build_layout(VIEW, encrypted=encrypted)
    if encrypted:
        session.execute("ALTER TABLE fhir.patient RENAME COLUMN _key_id TO _sealed_by")
        columns = [replace(c, name="_sealed_by") if c.name == KEY_ID_COLUMN else c for c in layout.columns]
        layout = replace(layout, columns=tuple(columns))
    session.execute("UPDATE ops.view_tables SET layout = %s", [f"{layout.shape}:{layout.fingerprint}"])
    session.execute("ALTER TABLE ops.bulk_exports DROP COLUMN kick_off_date, DROP COLUMN used_at, DROP COLUMN notices")
    session.execute("UPDATE ops.alembic_version SET version_num = '0019'")
    session.commit()


def find_keys(session: Session) -> dict[str, list[str]]:
    """Return the primary keys that contain a source, of the tables that revision 0027 changed."""
    rows = select(
        session,
        """
        SELECT
            i.indrelid::regclass::text,
            array(
                SELECT a.attname::text
                FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (number, position)
                JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
                ORDER BY position
            ) AS columns
        FROM pg_index i
        JOIN pg_class c ON c.oid = i.indrelid
        WHERE i.indisprimary AND NOT c.relispartition AND c.relnamespace IN ('fhir'::regnamespace, 'ops'::regnamespace)
        """,
    )
    return {table: columns for table, columns in rows if "source" in columns and table in KEYS_WITHOUT_SOURCE}


def test_a_database_at_revision_0019_reads_and_loads_after_the_upgrade(database: str, session: Session) -> None:
    encrypted = session.cipher.encrypts
    load(session, patient("a", gender="female", name=[{"family": "Old"}]), views=(VIEW,))
    dead_letters.record(session, "run", [DEAD_LETTER])
    session.execute(
        "INSERT INTO ops.loaded_parts (resource_type, partition_key, part, rows, run_id)"
        " VALUES ('Patient', '2024-01-01', 'part', 1, 'run')"
    )
    before = resources.read(session, "Patient", "a")
    session.commit()
    restore_revision_0019(session, encrypted=encrypted)
    assert not schema_state.is_current(database)

    migrations.upgrade(database)

    assert schema_state.is_current(database)
    assert find_drift(session, VIEW) == []
    ensure_tables(session, [VIEW])
    assert checkpoints.get_loaded_parts(session, "Patient", ["2024-01-01"]) == {"2024-01-01": frozenset({"part"})}
    assert before is not None
    # When it entered the tables is not known of a resource that was loaded by an earlier version.
    assert resources.read(session, "Patient", "a") == replace(before, created_at=None)
    [dead_letter] = dead_letters.find(session, Selection())
    assert dead_letters.read_resource(session, dead_letter.id) == DEAD_LETTER.resource
    assert replays.find_outdated(session, [("Patient", "validate", "rules")], limit=10) == []
    assert replays.find_outdated(session, [("Patient", "validate", "new rules")], limit=10) == [dead_letter.id]
    assert replays.request_replay(session, Selection()) == 1
    session.commit()
    load(session, patient("a", "2024-01-02T00:00:00Z", "2", gender="male"), patient("c"), views=(VIEW,))
    assert select(session, "SELECT _resource_key, gender FROM fhir.patient ORDER BY 1") == [("a", "male"), ("c", None)]
    assert select(session, "SELECT DISTINCT source FROM fhir.resource") == [("default",)]
    assert select(session, "SELECT DISTINCT _source FROM fhir.patient") == [("default",)]
    assert select(session, "SELECT source FROM ops.dead_letters") == [("default",)]
    keys = find_keys(session)
    for table, key in KEYS_WITHOUT_SOURCE.items():
        assert keys[table] == [*key.split(", "), "source"]
    key_ids = {key_id for (key_id,) in select(session, "SELECT key_id FROM fhir.resource")}
    assert key_ids == {session.cipher.key_id}


def test_bulk_exports_of_an_earlier_revision_count_as_loaded_and_those_without_files_are_not_used_again(
    database: str,
) -> None:
    with connect(database, cipher=NO_ENCRYPTION) as session:
        restore_revision_0019(session, encrypted=False)
        session.execute("""
            INSERT INTO ops.bulk_exports
                (id, base_url, level, resource_types, type_filter, status_url, status, error, requested_at,
                transaction_time, finished_at)
            VALUES
                ('stored', 'b', 'system', '{Patient}', '', 's', 'done', NULL, now(), now(), now()),
                ('old', 'b', 'system', '{Patient}', '', 's', 'failed', 'its files were deleted from the store', now(),
                    now(), now()),
                ('lost', 'b', 'system', '{Patient}', '', 's', 'failed', 'the server failed', now(), NULL, now())
        """)
        session.commit()
        migrations.upgrade(database)
        rows = select(session, "SELECT id, status, used_at IS NOT NULL FROM ops.bulk_exports ORDER BY id")
        assert rows == [("lost", "failed", False), ("old", "removed", True), ("stored", "done", True)]
        [export] = bulk_exports.find_usable(session, bulk_exports.Scope("b", "system", ""))
        assert (export.id, export.notices) == ("stored", ())
        session.commit()
        checkpoints.begin(session, ["Patient"], datetime.now(UTC), source_state=None)
        scope = bulk_exports.Scope("b", "system", "")
        assert bulk_exports.find_fully_loaded_types(session, scope, ["Patient", "Goal"]) == {"Patient"}


def test_a_stored_version_dated_in_the_future_no_longer_wins_after_the_upgrade(database: str, session: Session) -> None:
    load(session, patient("a", gender="female"), patient("b", gender="female"), views=(VIEW,))
    session.execute(
        "UPDATE fhir.resource SET last_updated = '9999-12-31T23:59:59Z', as_of = '9999-12-31T23:59:59Z' WHERE id = 'a'"
    )
    session.commit()
    restore_revision_0019(session, encrypted=session.cipher.encrypts)

    migrations.upgrade(database)

    assert select(session, "SELECT id, as_of = loaded_at, last_updated IS NULL FROM fhir.resource ORDER BY id") == [
        ("a", True, True),
        ("b", False, False),
    ]
    session.commit()
    newer = [replace(patient(key, "2024-01-02T00:00:00Z", gender="male"), arrived=datetime.now(UTC)) for key in "ab"]
    load(session, *newer, views=(VIEW,))
    assert select(session, "SELECT gender FROM fhir.patient") == [("male",), ("male",)]


def test_no_column_of_a_migrated_database_has_an_old_name(database: str, session: Session) -> None:
    load(session, patient("a"), views=(VIEW,))
    names = select(
        session,
        "SELECT DISTINCT column_name FROM information_schema.columns WHERE table_schema IN ('fhir', 'ops')"
        " AND column_name ~ 'seal|judge|marked|door|doing|heal|bur(y|ied)|letter'",
    )
    assert names == []


def test_the_patients_of_recorded_consents_are_kept(database: str, session: Session) -> None:
    ensure_tables(session, [VIEW])
    restore_revision_0019(session, encrypted=session.cipher.encrypts)
    session.execute(
        "INSERT INTO ops.consent_records (consent_id, patient_id, as_of, resource) VALUES ('c', 'a', now(), '{}')"
    )
    session.commit()
    migrations.upgrade(database)
    assert select(session, "SELECT keys FROM ops.consent_records") == [(["a"],)]
