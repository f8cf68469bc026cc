"""`fhir-assets roles`: what the role of each process may do and may not do, after a restore into another server too."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from typer.testing import CliRunner

from fhir_assets.cli.main import app
from fhir_assets.delivery.connector import dead_letters, outbox, progress
from fhir_assets.errors import ConfigurationError
from fhir_assets.metrics.pipeline import build_collector
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.postgres.db import embedded, role_rights, roles
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url, with_database
from fhir_assets.warehouse.postgres.db.process_roles import LOGINS
from fhir_assets_tests.support.database_users import User, is_refused
from fhir_assets_tests.support.databases import dagster_instance
from fhir_assets_tests.support.shipped_views import views_of_type
from fhir_assets_tests.support.views import load, patient

AUDIT_IS_KEPT = (
    "INSERT INTO ops.audit_log SELECT * FROM ops.audit_log",
    "UPDATE ops.audit_log SET actor = 'nobody'",
    "DELETE FROM ops.audit_log",
    "UPDATE ops.audit_head SET seq = 0",
    "ALTER TABLE ops.audit_log DISABLE TRIGGER ALL",
)
REFUSED = {
    role_rights.API: (
        *AUDIT_IS_KEPT,
        "CREATE TABLE fhir.mine (x int)",
        "ALTER TABLE fhir.patient ADD COLUMN x int",
        "DROP TABLE fhir.patient",
        "TRUNCATE fhir.patient",
        "CREATE VIEW marts.mine AS SELECT 1",
        "UPDATE ops.checkpoints SET loaded_until = now()",
        "DELETE FROM ops.ingestion_runs",
        "UPDATE ops.encryption SET key_id = ''",
        "UPDATE ops.alembic_version SET version_num = '0001'",
        "CREATE TABLE ops.mine (x int)",
    ),
    role_rights.CONNECTOR: (
        "SELECT FROM fhir.patient",
        "SELECT FROM fhir.resource",
        "SELECT FROM ops.consents",
        "SELECT FROM ops.dead_letters",
        "SELECT FROM ops.audit_log",
        "SELECT ops.append_audit(now(), '[]')",
        "UPDATE health.patient SET id = id",
        "DELETE FROM health.patient",
        "CREATE TABLE health.mine (x int)",
        "DROP TRIGGER fhir_outbox ON health.patient",
    ),
    role_rights.AUDITOR: (
        *AUDIT_IS_KEPT,
        "SELECT FROM fhir.patient",
        "SELECT FROM fhir.resource",
        "SELECT FROM ops.dead_letters",
        "SELECT FROM ops.consents",
        "SELECT FROM ops.corrections",
        "UPDATE ops.encryption SET key_id = ''",
    ),
    role_rights.DAGSTER: (
        "SELECT FROM fhir.patient",
        "SELECT FROM fhir.resource",
        "SELECT FROM ops.ingestion_runs",
        "SELECT FROM ops.audit_log",
        "SELECT ops.append_audit(now(), '[]')",
        "SELECT FROM ops.encryption",
    ),
}


@pytest.fixture
def filled(database: str) -> str:
    """The URL of a database with a patient, an audit record and an outbox with a change."""
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        load(conn, patient("a", gender="male"), views=tuple(views_of_type("Patient")))
        outbox.install(conn)
        conn.execute("INSERT INTO health.patient (identifier_system, identifier_value) VALUES ('urn:mrn', '1')")
        audit_log.record(conn, AuditRecord("read", "test"))
    return database


@pytest.mark.parametrize("role", REFUSED)
def test_a_process_may_not_do_what_it_does_not_need(filled: str, user: User, role: str) -> None:
    url = user(role)
    assert [statement for statement in REFUSED[role] if not is_refused(url, statement)] == []


def test_an_auditor_verifies_and_lists_the_log_and_is_recorded(filled: str, user: User) -> None:
    url = user(role_rights.AUDITOR)
    result = CliRunner().invoke(app, ["audit", "verify"], env={"DB_URL": url}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with connect(url, cipher=NO_ENCRYPTION) as conn:
        audit_log.record(conn, AuditRecord("read", "an auditor"))
        assert audit_log.get_head(conn)[0] == 2


def test_a_connector_delivers_and_reports_changes(filled: str, user: User) -> None:
    url = user(role_rights.CONNECTOR)
    with SandboxServer([]) as server:
        environment = {"DB_URL": url, "CONNECTOR_URL": server.url, "METRICS_PORT": "0"}
        arguments = ["connector", "run", "--until-empty"]
        result = CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    with connect(filled) as conn:
        assert conn.execute("SELECT count(*) FROM health.fhir_delivered").fetchone() == (1,)
    with connect(url, cipher=NO_ENCRYPTION) as conn:
        assert dead_letters.replay(conn, None) == 0
    collector = build_collector(load_settings(db_url=url), lambda: connect(url))
    samples = {metric.name: [sample.value for sample in metric.samples] for metric in collector.collect()}
    assert samples["fhir_database_up"] == [1]
    assert [name for name in samples if "outbox" in name] != []


@pytest.mark.parametrize("role", [role_rights.LOADER, role_rights.OPERATOR])
def test_loaders_and_operators_see_how_far_deliveries_are_and_no_identifier(filled: str, user: User, role: str) -> None:
    url = user(role)
    with connect(url, cipher=NO_ENCRYPTION) as conn:
        assert outbox.is_installed(conn)
        assert progress.check_health(conn, max_lag_seconds=60).status.unprocessed == 1
        assert progress.count_since(conn, "health.patient", None).changes == 0
    for statement in (
        "SELECT FROM health.patient",
        "SELECT former_value FROM health.fhir_outbox",
        "SELECT identifier_value FROM health.fhir_delivered",
        "DELETE FROM health.fhir_outbox",
    ):
        assert is_refused(url, statement), statement


def test_dagster_makes_its_tables_in_a_database_of_its_own(empty_database: str, user: User, tmp_path: Path) -> None:
    with connect(empty_database) as conn:
        roles.grant_dagster_rights(conn)
    login = user(role_rights.DAGSTER).partition("@")[0].rpartition("/")[2]
    url = empty_database.replace("postgres@", f"{login}@")
    with dagster_instance(tmp_path, url) as instance:
        assert instance.get_runs_count() == 0
    with connect(empty_database) as conn:
        conn.execute("CREATE TABLE public.of_the_owner (x int)")
        roles.grant_dagster_rights(conn)
    with connect(url) as conn:
        conn.execute("ALTER TABLE public.of_the_owner ADD COLUMN y int")
        conn.execute("INSERT INTO public.of_the_owner VALUES (1, 2)")
    with connect(empty_database) as conn:
        conn.execute(f"REASSIGN OWNED BY {login} TO postgres".encode())
        conn.execute(f"DROP OWNED BY {login}".encode())


def run_roles(url: str, *arguments: str, **variables: str) -> list[dict[str, Any]]:
    """Run `fhir-assets roles` and return the rows that it prints."""
    environment = {"DB_URL": url, "DAGSTER_POSTGRES_URL": normalise_url(url, "psycopg2"), **variables}
    result = CliRunner().invoke(app, ["roles", "--json", *arguments], env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def read_rights(url: str) -> list[tuple[Any, ...]]:
    """Return the rights of the group roles and of everybody on schemas, relations and functions, and what roles own."""
    with connect(url) as conn:
        return conn.execute(
            """
            WITH objects (name, owner, rights) AS (
                SELECT 'schema ' || nspname, nspowner, coalesce(nspacl, acldefault('n', nspowner)) FROM pg_namespace
                UNION ALL
                SELECT n.nspname || '.' || relname, relowner, coalesce(relacl, acldefault('r', relowner))
                FROM pg_class c
                JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE relkind IN ('r', 'p', 'v', 'S')
                    AND nspname IN ('fhir', 'fhir_partitions', 'ops', 'marts', 'health')
                UNION ALL
                SELECT p.oid::regprocedure::text, proowner, coalesce(proacl, acldefault('f', proowner))
                FROM pg_proc p
                WHERE pronamespace = 'ops'::regnamespace AND prosecdef
            )
            SELECT
                name,
                CASE WHEN owner::regrole::text LIKE 'fhir\\_%' THEN owner::regrole::text END,
                CASE WHEN r.grantee = 0 THEN 'everybody' ELSE r.grantee::regrole::text END,
                r.privilege_type
            FROM objects, aclexplode(rights) r
            WHERE (r.grantee = 0 OR r.grantee::regrole::text LIKE 'fhir\\_%')
                AND name NOT IN ('schema public', 'schema pg_catalog', 'schema information_schema')
            ORDER BY 1, 2, 3, 4
            """
        ).fetchall()


def test_a_second_call_changes_nothing_and_the_logins_have_the_roles(filled: str) -> None:
    run_roles(filled)
    before = read_rights(filled)
    rows = run_roles(filled, "--logins", "--password-env", "ROLE_PASSWORD", ROLE_PASSWORD="secret")
    assert {row["role"]: row["login"] for row in rows if row["login"]} == LOGINS
    assert read_rights(filled) == before
    for role, login in LOGINS.items():
        with connect(filled.replace("postgres@", f"{login}@")) as conn:
            assert conn.execute("SELECT pg_has_role(%s, 'USAGE')", [role]).fetchone() == (True,)
    with connect(filled) as conn:
        (powerful,) = conn.execute(
            """
            SELECT count(*)
            FROM pg_roles
            WHERE (rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls) AND rolname = ANY(%s)
            """,
            [[*LOGINS.values()]],
        ).fetchall()
    assert powerful == (0,)


def test_a_password_that_is_not_set_and_an_owner_without_the_right_are_reported(database: str, user: User) -> None:
    environment = {"DB_URL": user(role_rights.LOADER), "DAGSTER_POSTGRES_URL": normalise_url(database, "psycopg2")}
    result = CliRunner().invoke(app, ["roles", "--logins", "--password-env", "NO_SUCH"], env=environment)
    assert "NO_SUCH, which is not set" in str(result.exception)
    result = CliRunner().invoke(app, ["roles"], env=environment)
    assert "run `fhir-assets roles` as their owner" in str(result.exception)


def test_each_login_has_a_password_of_its_own_and_none_the_password_of_another(database: str) -> None:
    names = [f"POSTGRES_{login.removeprefix('fhir_assets_').upper()}_PASSWORD" for login in LOGINS.values()]
    passwords = {name: f"p@ss:w/rd#{name}" for name in names[1:]}
    arguments = ["--logins", "--password-env", "POSTGRES_{}_PASSWORD"]
    query = "SELECT rolname, rolpassword FROM pg_authid WHERE rolname = ANY(%s)"
    with connect(database, autocommit=True) as conn:
        for login in LOGINS.values():
            roles.ensure_login(conn, login, role_rights.READER, "before")
        before: dict[str, str] = dict(conn.execute(query, [[*LOGINS.values()]]).fetchall())
        run_roles(database, *arguments, **passwords)
        after: dict[str, str] = dict(conn.execute(query, [[*LOGINS.values()]]).fetchall())
        for login in LOGINS.values():
            conn.execute(sql.SQL("REVOKE {} FROM {}").format(*map(sql.Identifier, (role_rights.READER, login))))
    # The password of a login without a variable is kept.
    assert [login for login in LOGINS.values() if before[login] == after[login]] == [LOGINS[role_rights.LOADER]]
    owner = database.replace("postgres@", f"postgres:{names[0]}@")
    for refused, url in (
        ({}, database),
        ({names[1]: "same", names[2]: "same"}, database),
        ({names[1]: names[0], names[2]: "other"}, owner),
    ):
        environment = {"DB_URL": url, **dict.fromkeys(names), **refused}
        result = CliRunner().invoke(app, ["roles", *arguments], env=environment)
        assert isinstance(result.exception, ConfigurationError)
        assert (names[1] if refused else names[0]) in str(result.exception)
        assert "same" not in str(result.exception).replace("are the same", "")


@pytest.fixture
def other_server() -> Iterator[str]:
    """The URL of a Postgres without any role of the project."""
    home = Path(tempfile.mkdtemp(prefix="fhir_assets_test_restored_"))
    home.chmod(0o711)
    try:
        yield embedded.ensure(home)
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-owner", "--no-privileges"]], ids=["with rights", "without rights"])
def test_a_database_restored_into_another_server_has_its_rights_again(
    filled: str, other_server: str, tmp_path: Path, options: list[str]
) -> None:
    programs = embedded.find_programs(tmp_path)
    dump = tmp_path / "dump"
    subprocess.run([programs / "pg_dump", "-Fc", "-f", dump, filled], check=True, env=os.environ)
    with connect(other_server, autocommit=True) as conn:
        conn.execute("CREATE DATABASE restored")
    restored = with_database(other_server, "restored")
    # Ends with an error, because the roles do not exist.
    subprocess.run([programs / "pg_restore", *options, "-d", restored, dump], check=False, capture_output=True)
    run_roles(restored)
    assert read_rights(restored) == read_rights(filled)
    with connect(restored, cipher=NO_ENCRYPTION) as conn:
        assert audit_log.find_fault(conn) is None
        conn.execute("SET ROLE fhir_operator")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("SELECT FROM ops.consents")
