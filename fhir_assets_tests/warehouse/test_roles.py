"""The group roles: the rights that a member of each role has and lacks."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.errors import ConfigurationError, DatabaseUnavailable
from fhir_assets.fhir.views import ViewSet
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import audit_log, dead_letters, encryption_secret, replays
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Selection
from fhir_assets.warehouse.postgres.db import connections, embedded, migrations, role_rights, roles
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, connect, with_database
from fhir_assets.warehouse.postgres.tables import deletions, view_tables
from fhir_assets_tests.support.daemon import wait_until
from fhir_assets_tests.support.database_users import User, is_refused
from fhir_assets_tests.support.key_rotation import (
    DEAD_LETTER,
    PATIENT,
    VIEWS,
    fill_deployment,
    load_people,
    open_store_in,
)
from fhir_assets_tests.support.shipped_views import views_of_type
from fhir_assets_tests.support.views import column, load, patient, view

KEY = new_key()


@pytest.fixture
def filled(database: str, tmp_path: Path) -> str:
    """The URL of a database with rows in every table. The owner created the tables of views."""
    cipher = unlock(database)
    with connect(database, cipher=cipher) as conn:
        fill_deployment(conn, open_store_in(tmp_path, cipher), people=3)
        audit_log.record(conn, AuditRecord("read", "test"))
    return database


def unlock(url: str) -> Cipher:
    with connect(url) as conn:
        return encryption_secret.unlock(conn, Cipher(parse_keys([KEY])))


def list_ops_tables(conn: Connection) -> list[str]:
    rows = conn.execute(
        """
        SELECT relname
        FROM pg_class
        WHERE relnamespace = 'ops'::regnamespace
        AND relkind IN ('r', 'v')
        """
    )
    return [name for (name,) in rows]


def test_the_owner_takes_the_role_of_readers(filled: str) -> None:
    with connect(filled) as conn:
        assert roles.take_reader_role(conn)
        assert roles.describe_reader(conn) == "as fhir_reader, which may read tables only"
        assert conn.execute("SELECT count(*) FROM fhir.patient").fetchone() == (3,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("SELECT FROM fhir.resource")


def test_a_login_that_is_no_member_of_the_readers_keeps_its_own_rights(filled: str, user: User) -> None:
    with connect(user(role_rights.LOADER)) as conn:
        assert not roles.take_reader_role(conn)
        assert "no member of fhir_reader" in roles.describe_reader(conn)
        conn.execute("SELECT FROM fhir.resource")


def test_a_reader_may_select_from_the_tables_of_views_only(filled: str, user: User) -> None:
    url = user(role_rights.READER)
    with connect(url) as conn:
        [(family,)] = conn.execute("SELECT DISTINCT left(family, 4) FROM fhir.patient_name").fetchall()
        assert family == "fs2_"
        assert conn.execute("SELECT type, id, why FROM fhir.deleted").fetchall() == []
    for statement in (
        "SELECT FROM fhir.resource",
        "SELECT FROM fhir_partitions.resource_patient",
        "SELECT FROM ops.dead_letters",
        "SELECT FROM ops.encryption",
        "DELETE FROM fhir.patient",
        "UPDATE fhir.patient SET gender = ''",
        "TRUNCATE fhir.patient",
        "CREATE TABLE fhir.mine (x int)",
    ):
        assert is_refused(url, statement), statement


def test_an_operator_manages_runs_and_dead_letters_but_reads_no_patient_data(filled: str, user: User) -> None:
    url = user(role_rights.OPERATOR)
    with connect(url, cipher=unlock(filled)) as conn:
        assert conn.execute("SELECT count(*) FROM ops.ingestion_runs").fetchone() == (0,)
        assert [dead_letter.rule for dead_letter in dead_letters.find(conn, Selection(), limit=5)] == [DEAD_LETTER.rule]
        replays.request_replay(conn, Selection())
        audit_log.record(conn, AuditRecord("replay", "an operator"))
    for statement in (
        "SELECT FROM fhir.patient",
        "SELECT FROM fhir.resource",
        "SELECT FROM ops.withheld",
        "SELECT FROM ops.consent_records",
        "SELECT FROM ops.consents",
        "SELECT FROM ops.consent_changes",
        "SELECT FROM ops.visits",
        "SELECT FROM ops.visit_persons",
        "SELECT FROM ops.idempotency",
        "UPDATE ops.encryption SET key_id = ''",
        "DELETE FROM ops.dead_letters",
        "DELETE FROM ops.ingestion_runs",
        "UPDATE ops.checkpoints SET loaded_until = now()",
    ):
        assert is_refused(url, statement), statement


def test_an_operator_without_keys_lists_runs_and_dead_letters_and_cannot_decrypt_them(
    filled: str, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_URL", user(role_rights.OPERATOR))
    for command in (["runs", "list"], ["dead-letters", "list", "--run", "run"]):
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    shown = CliRunner().invoke(app, ["dead-letters", "show", "1"])
    assert "PHI_ENCRYPTION_KEYS is not set" in str(shown.exception)


def test_a_loader_may_load_correct_delete_and_create_tables(filled: str, user: User) -> None:
    url = user(role_rights.LOADER)
    cipher = unlock(url)
    with connect(url, cipher=cipher) as conn:
        load_people(conn, range(2, 6), version="2", updated="2024-02-01T00:00:00Z")
        load(conn, patient("other"), views=(view("patient_more", "Patient", column("gender", "gender", "code")),))
        dead_letters.record(conn, "run", [DeadLetter("Patient", "x", "load", "r", "", "", b"x", "2024-01-01")])
        deletion = deletions.Deletion("Patient", "p00000", patient("p").as_of.replace(year=2025))
        assert deletions.apply(conn, [deletion], run_id="run").deleted == {"Patient": 1}
        conn.commit()
        assert audit_log.find_fault(conn) is None
    for statement in (
        "CREATE TABLE ops.mine (x int)",
        "DELETE FROM ops.encryption",
        "UPDATE ops.encryption SET key_id = ''",
        "UPDATE ops.alembic_version SET version_num = '0001'",
        "DROP TABLE fhir_partitions.resource_patient",
        "TRUNCATE fhir.resource",
    ):
        assert is_refused(url, statement), statement


@pytest.mark.parametrize("role", [role_rights.LOADER, role_rights.OPERATOR])
def test_no_role_has_rights_to_change_the_audit_log(filled: str, user: User, role: str) -> None:
    url = user(role)
    for statement in (
        "UPDATE ops.audit_log SET actor = 'nobody'",
        "DELETE FROM ops.audit_log",
        "TRUNCATE ops.audit_log",
        "INSERT INTO ops.audit_log SELECT * FROM ops.audit_log",
        "UPDATE ops.audit_head SET seq = 0",
        "SELECT FROM ops.audit_head FOR UPDATE",
        "DELETE FROM ops.audit_head",
        "TRUNCATE ops.audit_head",
        "ALTER TABLE ops.audit_log DISABLE TRIGGER ALL",
        "DROP TABLE ops.audit_log",
    ):
        assert is_refused(url, statement), statement


@pytest.mark.parametrize("role", [role_rights.LOADER, role_rights.OPERATOR])
def test_a_record_names_the_login_that_wrote_it_and_no_other(filled: str, user: User, role: str) -> None:
    url = user(role)
    with connect(url, cipher=unlock(filled)) as conn:
        audit_log.record(conn, AuditRecord("replay", "an operator"))
        (entry,) = audit_log.find_latest(conn, limit=1)
        assert entry.writer is not None
        assert entry.writer.database_user == conn.info.user
        assert audit_log.find_fault(conn) is None


def test_a_reader_cannot_append_to_the_audit_log(filled: str, user: User) -> None:
    url = user(role_rights.READER)
    for statement in (
        "SELECT ops.lock_audit_head()",
        "SELECT ops.append_audit(now(), '[]')",
        "SELECT ops.confirm_audit_mark()",
    ):
        assert is_refused(url, statement), statement


def test_functions_with_the_rights_of_the_owner_have_a_fixed_search_path_and_are_not_for_everybody(
    conn: Connection,
) -> None:
    rows = conn.execute(
        """
        SELECT proname, proconfig, has_function_privilege('fhir_reader', oid, 'EXECUTE')
        FROM pg_proc
        WHERE prosecdef AND pronamespace::regnamespace::text IN ('ops', 'fhir', 'marts', 'health', 'public')
        ORDER BY proname
        """
    ).fetchall()
    path = ["search_path=pg_catalog, pg_temp"]
    assert rows == [(name, path, False) for name in ("append_audit", "confirm_audit_mark", "lock_audit_head")]


def test_a_table_that_a_loader_creates_is_shared_with_readers_and_other_loaders(database: str, user: User) -> None:
    with connect(user(role_rights.LOADER), cipher=NO_ENCRYPTION) as conn:
        load(conn, patient("a", gender="male"), views=(PATIENT,))
    wider = view(
        "patient", "Patient", *PATIENT.definition["select"][0]["column"], column("active", "active", "boolean")
    )
    with connect(user(role_rights.LOADER), cipher=NO_ENCRYPTION) as conn:
        view_tables.ensure_tables(conn, [wider])
    with connect(user(role_rights.READER), cipher=NO_ENCRYPTION) as conn:
        assert conn.execute("SELECT gender, active FROM fhir.patient").fetchall() == [("male", None)]


def test_a_loader_may_run_migrate_on_a_current_database(database: str, user: User) -> None:
    migrations.upgrade(user(role_rights.LOADER))
    with connect(database) as conn:
        conn.execute("DROP TABLE fhir_partitions.resource_claim")
    with pytest.raises(ConfigurationError, match="run `fhir-assets migrate` as the user that owns them"):
        migrations.upgrade(user(role_rights.LOADER))


def test_the_error_for_a_reader_names_the_required_role(database: str, user: User) -> None:
    with pytest.raises(ConfigurationError, match="grant it the role fhir_loader"):
        migrations.upgrade(user(role_rights.READER))


def test_the_error_for_a_table_of_another_owner_names_who_may_change_it(conn: Session, user: User) -> None:
    view_tables.ensure_tables(conn, VIEWS)
    conn.execute("ALTER TABLE fhir.patient OWNER TO postgres")
    conn.commit()
    wider = view("patient", "Patient", column("active", "active", "boolean"))
    with connect(user(role_rights.LOADER), cipher=NO_ENCRYPTION) as loader:
        with pytest.raises(ConfigurationError, match="run `fhir-assets migrate` as the user that owns"):
            view_tables.apply_changes(loader, [wider])


NAMING_PATIENTS = {
    *(
        "consent_changes",
        "consent_records",
        "consents",
        "idempotency",
        "identifier_types",
        "numbers",
        "posted_resources",
    ),
    *("record_posts", "visit_persons", "visit_persons_elsewhere", "visit_posts", "visits", "withheld"),
}


def test_every_table_of_schema_ops_has_grants_and_a_new_one_is_for_the_loader_only(conn: Connection) -> None:
    conn.execute("CREATE TABLE ops.a_new_one (x int)")
    roles.grant_rights(conn)
    hidden = {
        role_rights.LOADER: set(),
        role_rights.OPERATOR: {*NAMING_PATIENTS, "a_new_one"},
        role_rights.API: {"a_new_one"},
    }
    for role, names in hidden.items():
        for name in list_ops_tables(conn):
            row = conn.execute("SELECT has_table_privilege(%s, %s, 'SELECT')", [role, f"ops.{name}"]).fetchone()
            assert row == (name not in names,), (role, name)


def test_other_rights_are_revoked(conn: Connection) -> None:
    conn.execute("GRANT UPDATE ON ops.audit_log TO fhir_loader")
    roles.grant_rights(conn)
    assert conn.execute("SELECT has_table_privilege('fhir_loader', 'ops.audit_log', 'UPDATE')").fetchone() == (False,)


def test_a_vacuum_that_ends_while_rights_are_granted_is_no_deadlock(database: str) -> None:
    """VACUUM and ANALYZE hold a lock on their table, and at the end wait for transactions that changed its rights."""
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        view_tables.ensure_tables(conn, views_of_type("Patient"))
        conn.execute("ALTER TABLE fhir.patient OWNER TO postgres")
    with (
        connect(database) as vacuum,
        connect(database) as conn,
        connect(database, autocommit=True) as observer,
        ThreadPoolExecutor(1) as pool,
    ):
        vacuum.execute("LOCK TABLE fhir.patient IN SHARE UPDATE EXCLUSIVE MODE")
        granting = pool.submit(roles.grant_rights, conn)
        waits = "SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted"
        wait_until(lambda: observer.execute(waits, [conn.info.backend_pid]).fetchone() == (1,), seconds=30)
        vacuum.execute("ANALYZE fhir.patient")
        vacuum.commit()
        granting.result()
        conn.commit()
        owner = observer.execute("SELECT relowner::regrole::text FROM pg_class WHERE oid = 'fhir.patient'::regclass")
        assert owner.fetchone() == ("fhir_loader",)


def test_an_upgrade_is_repeated_after_a_deadlock(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(database) as conn:
        conn.execute("DROP TABLE fhir_partitions.resource_claim")
    attempts = []

    def grant_rights(conn: Connection) -> None:
        attempts.append(conn)
        if len(attempts) < 3:
            # What a deadlock with a real session raises; which of the two Postgres cancels is not ours to choose.
            raise psycopg.errors.DeadlockDetected

    monkeypatch.setattr(roles, "grant_rights", grant_rights)
    migrations.upgrade(database)
    assert len(attempts) == 3
    with connect(database) as conn:
        conn.execute("DROP TABLE fhir_partitions.resource_claim")
    del attempts[:]
    monkeypatch.setattr(connections, "_ATTEMPTS", 2)
    with pytest.raises(DatabaseUnavailable, match="cancelled the upgrade of the schema 2 times"):
        migrations.upgrade(database)


def test_only_views_that_we_created_in_schema_marts_get_rights(conn: Session) -> None:
    conn.execute("CREATE VIEW marts.mine AS SELECT * FROM fhir.resource")
    conn.execute("CREATE MATERIALIZED VIEW marts.stored AS SELECT 1 AS id")
    conn.execute("CREATE TABLE marts.notes (id int PRIMARY KEY)")
    view_tables.ensure_tables(conn, views_of_type("Patient"))
    roles.grant_rights(conn)
    rows = conn.execute(
        """
        SELECT relname
        FROM pg_class
        WHERE relnamespace = 'marts'::regnamespace
            AND (relowner = 'fhir_loader'::regrole OR has_table_privilege('fhir_reader', oid, 'SELECT'))
        ORDER BY relname
        """
    ).fetchall()
    assert rows == [("patient_current",), ("patients",), ("persons",)]


def test_rights_that_are_granted_again_do_not_wait_for_readers_of_tables_and_marts(database: str) -> None:
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        view_tables.ensure_tables(conn, views_of_type("Patient"))
        roles.grant_rights(conn)
    with connect(database) as reader, connect(database) as conn:
        reader.execute("SELECT FROM marts.patients, marts.patient_current, fhir.deleted")
        conn.execute("SET lock_timeout = 1")
        roles.grant_rights(conn)


@pytest.mark.slow
def test_a_migration_without_the_right_to_create_roles_continues_with_a_warning(
    own_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = with_database(own_server, "clinic").replace("postgres@", "plain@")
    monkeypatch.setenv("DB_URL", plain)
    monkeypatch.setenv("FHIR_ASSETS_HOME", str(tmp_path))
    monkeypatch.setattr("fhir_assets.cli.migrate.build_views", lambda settings: ViewSet(VIEWS, ()))
    monkeypatch.setattr("fhir_assets.orchestration.instance.config.ensure_dagster_database", lambda settings: plain)
    result = CliRunner().invoke(app, ["migrate"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "CREATE ROLE fhir_reader NOLOGIN; CREATE ROLE fhir_operator NOLOGIN" in result.output
    with connect(own_server, autocommit=True, cipher=NO_ENCRYPTION) as conn:
        for role in role_rights.ROLES:
            conn.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    assert "CREATE ROLE" not in CliRunner().invoke(app, ["migrate"], catch_exceptions=False).output
    with connect(plain, cipher=NO_ENCRYPTION) as conn:
        load_people(conn, range(2))
        for role, table in ((role_rights.READER, "fhir.patient_name"), (role_rights.OPERATOR, "ops.dead_letters")):
            allowed = conn.execute("SELECT has_table_privilege(%s, %s, 'SELECT')", [role, table]).fetchone()
            assert allowed == (True,)


@pytest.fixture
def own_server() -> Iterator[str]:
    """The URL of a Postgres without the group roles, with a database whose owner may not create roles."""
    home = Path(tempfile.mkdtemp(prefix="fhir_assets_test_roles_"))
    home.chmod(0o711)
    try:
        url = embedded.ensure(home)
        with connect(url, autocommit=True) as conn:
            conn.execute("CREATE ROLE plain LOGIN")
            conn.execute("CREATE DATABASE clinic OWNER plain")
        yield url
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)
