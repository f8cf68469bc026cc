"""The audit log is append-only, is one chain of links, and is committed together with the audited action."""

import json
import os
import pwd
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg import sql
from typer.testing import CliRunner

from fhir_assets.cli.audit import app
from fhir_assets.privacy.audit import START, AuditRecord, Fault, Writer, link
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher, new_secret
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, connect
from fhir_assets.warehouse.postgres.queries.patients import read_patient
from fhir_assets_tests.support.views import load, patient, select

CIPHER = Cipher(parse_keys([new_key()]), new_secret())


@pytest.fixture(params=[NO_ENCRYPTION, CIPHER], ids=["without keys", "with keys"])
def log(request: pytest.FixtureRequest, database: str) -> Iterator[Session]:
    with connect(database, autocommit=True, cipher=request.param) as conn:
        for number in range(10):
            audit_log.record(
                conn, AuditRecord("read", "test", "Patient", audit_log.hash_subject(conn, "Patient", str(number)))
            )
        yield conn


def tamper(conn: Connection, statement: str) -> None:
    """Execute a statement without the triggers, as only the owner of the tables can."""
    conn.execute("ALTER TABLE ops.audit_log DISABLE TRIGGER USER")
    conn.execute(sql.SQL(statement))
    conn.execute("ALTER TABLE ops.audit_log ENABLE TRIGGER USER")


def test_an_unchanged_log_has_no_fault(log: Session) -> None:
    assert audit_log.find_fault(log) is None
    assert audit_log.get_head(log)[0] == 10


@pytest.mark.parametrize(
    "change",
    [
        "actor = 'another'",
        "at = at + interval '1 microsecond'",
        "count = 2",
        "subject = NULL",
        "detail = '{\"a\": 1}'",
        "link = decode(repeat('00', 32), 'hex')",
    ],
)
def test_an_altered_record_is_detected(log: Session, change: str) -> None:
    tamper(log, f"UPDATE ops.audit_log SET {change} WHERE seq = 4")
    assert audit_log.find_fault(log) == Fault(4, "altered")


@pytest.mark.parametrize("seq", [1, 5, 10])
def test_a_deleted_record_is_detected_including_the_last(log: Session, seq: int) -> None:
    tamper(log, f"DELETE FROM ops.audit_log WHERE seq = {seq}")
    assert audit_log.find_fault(log) == Fault(seq, "missing")


def test_an_appended_copy_of_a_record_is_detected(log: Session) -> None:
    copied = "action, actor, resource_type, subject, count, run_id, request_id, detail, keyed, link"
    tamper(
        log, f"INSERT INTO ops.audit_log (seq, at, {copied}) SELECT 11, at, {copied} FROM ops.audit_log WHERE seq = 3"
    )
    assert audit_log.find_fault(log) == Fault(11, "inserted")


def test_a_record_inserted_between_others_is_detected(log: Session) -> None:
    copied = "action, actor, resource_type, subject, count, run_id, request_id, detail, keyed, link"
    tamper(
        log,
        "UPDATE ops.audit_log SET seq = -seq WHERE seq > 5;"
        "UPDATE ops.audit_log SET seq = -seq + 1 WHERE seq < 0;"
        f"INSERT INTO ops.audit_log (seq, at, {copied}) SELECT 6, at, {copied} FROM ops.audit_log WHERE seq = 3",
    )
    assert audit_log.find_fault(log) == Fault(6, "altered")


def test_a_chain_cannot_be_repaired_without_the_keys(database: str) -> None:
    with connect(database, autocommit=True, cipher=CIPHER) as conn:
        audit_log.record(conn, AuditRecord("read", "test"), AuditRecord("export", "thief", count=1000))
    with connect(database, autocommit=True, cipher=NO_ENCRYPTION) as conn:
        tamper(conn, "DELETE FROM ops.audit_log WHERE seq = 2")
        conn.execute("UPDATE ops.audit_head h SET seq = 1, link = l.link FROM ops.audit_log l WHERE l.seq = 1")
        audit_log.record(conn, AuditRecord("read", "nobody"))
    with connect(database, autocommit=True, cipher=CIPHER) as conn:
        assert audit_log.find_fault(conn) == Fault(2, "altered")


def run_verify(url: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run `fhir-assets audit verify` and return its exit code and JSON output."""
    result = CliRunner().invoke(app, ["verify", "--json", *arguments], env={"DB_URL": url})
    return result.exit_code, json.loads(result.stdout)


def test_verify_detects_altered_records_and_records_removed_since_the_noted_link(database: str) -> None:
    with connect(database, autocommit=True, cipher=NO_ENCRYPTION) as conn:
        audit_log.record(conn, *(AuditRecord("read", f"test {number}") for number in range(5)))
        code, output = run_verify(database)
        assert (code, output["records"], output["fault"]) == (0, 5, None)
        noted = f"5:{output['link']}"
        audit_log.record(conn, AuditRecord("read", "later"))
        assert run_verify(database, "--noted", noted)[0] == 0
        # Replace the last records and adjust the head: the chain is intact, but differs from the noted link.
        tamper(conn, "DELETE FROM ops.audit_log WHERE seq > 3")
        conn.execute("UPDATE ops.audit_head h SET seq = 3, link = l.link FROM ops.audit_log l WHERE l.seq = 3")
        assert run_verify(database)[0] == 0
        assert run_verify(database, "--noted", noted)[1]["fault"] == {"seq": 5, "what": "missing"}
        audit_log.record(conn, AuditRecord("read", "forged"), AuditRecord("read", "forged"))
        assert run_verify(database, "--noted", noted) == (
            1,
            {**run_verify(database)[1], "fault": {"seq": 5, "what": "altered"}},
        )
        tamper(conn, "UPDATE ops.audit_log SET actor = 'another' WHERE seq = 2")
        assert run_verify(database)[0] == 1
        assert run_verify(database)[1]["fault"] == {"seq": 2, "what": "altered"}


def test_records_from_before_the_first_key_stay_valid(database: str) -> None:
    with connect(database, autocommit=True, cipher=NO_ENCRYPTION) as conn:
        audit_log.record(conn, AuditRecord("read", "test"))
    with connect(database, autocommit=True, cipher=CIPHER) as conn:
        audit_log.record(conn, AuditRecord("read", "test"))
        assert audit_log.find_fault(conn) is None


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ops.audit_log SET actor = 'x'",
        "DELETE FROM ops.audit_log",
        "TRUNCATE ops.audit_log",
        "DELETE FROM ops.audit_head",
        "TRUNCATE ops.audit_head",
    ],
)
def test_the_log_is_append_only(log: Connection, statement: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        log.execute(statement.encode())


KEEP_THE_SETTING_OF_COMMITS = """
    CREATE TABLE public.commits (setting text);
    CREATE FUNCTION public.keep_setting() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.commits SELECT current_setting('synchronous_commit');
        RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER keep_setting AFTER UPDATE ON ops.audit_head DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION public.keep_setting()
"""
"""Deferred triggers of a table act at the commit, in the order of their names."""


@pytest.mark.parametrize(
    "statement",
    [
        "SET synchronous_commit = off",
        "SET LOCAL synchronous_commit = off",
        "SET ROLE fhir_loader; SET LOCAL synchronous_commit = off",
    ],
)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_transaction_with_an_audit_record_waits_for_the_disk_whenever_its_session_set_that_off(
    database: str, statement: str, moment: str
) -> None:
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        conn.execute(sql.SQL(KEEP_THE_SETTING_OF_COMMITS))
        conn.execute("GRANT INSERT ON public.commits TO fhir_loader")
        conn.commit()
        if moment == "before":
            conn.execute(sql.SQL(statement))
        audit_log.record(conn, AuditRecord("delete", "test"))
        if moment == "after":
            conn.execute(sql.SQL(statement))
    with connect(database) as conn:
        assert conn.execute("SELECT setting FROM public.commits").fetchall() == [("on",)]


def test_a_transaction_with_an_audit_record_waits_for_the_disk_whatever_the_database_has_set(database: str) -> None:
    with connect(database, autocommit=True) as conn:
        conn.execute(sql.SQL(KEEP_THE_SETTING_OF_COMMITS))
        name = sql.Identifier(conn.info.dbname)
        conn.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit = off").format(name))
    with connect(database, autocommit=True, cipher=NO_ENCRYPTION) as conn:
        audit_log.record(conn, AuditRecord("delete", "test"))
        assert conn.execute("SELECT setting FROM public.commits").fetchall() == [("on",)]
        assert conn.execute("SHOW synchronous_commit").fetchone() == ("off",)


def test_a_record_names_the_login_and_the_account_by_its_uid_and_the_name_of_the_environment_as_a_claim(
    conn: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "mallory")
    audit_log.record(conn, AuditRecord("read", "test"), AuditRecord("edit", "test", claim="anna"))
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    audit_log.record(conn, AuditRecord("read", "test", claim="\udcff" * 2))
    first, second, third = reversed(audit_log.find_latest(conn, limit=3))
    assert first.writer == second.writer == Writer(conn.info.user, pwd.getpwuid(os.geteuid()).pw_name)
    assert third.writer == Writer(conn.info.user, "uid 54321")
    claims = [entry.audit_record.claim for entry in (first, second, third)]
    assert claims == ["mallory", "anna", "\\udcff\\udcff"]
    assert audit_log.find_fault(conn) is None


@pytest.mark.parametrize("change", ["database_user = 'x'", "account = 'x'", "claim = 'x'", "database_user = NULL"])
def test_an_altered_writer_is_detected(log: Session, change: str) -> None:
    tamper(log, f"UPDATE ops.audit_log SET {change} WHERE seq = 4")
    assert audit_log.find_fault(log) == Fault(4, "altered")


def test_records_from_before_the_columns_of_the_writer_stay_valid(conn: Session) -> None:
    at = datetime(2024, 1, 5, tzinfo=UTC)
    linked = link(1, at, AuditRecord("read", "cli:anna", "Patient"), None, START, NO_ENCRYPTION)
    conn.execute(
        """
        INSERT INTO ops.audit_log (seq, at, action, actor, resource_type, count, detail, keyed, link)
        VALUES (1, %s, 'read', 'cli:anna', 'Patient', 1, '{}', false, %s)
        """,
        [at, linked],
    )
    conn.execute("UPDATE ops.audit_head SET seq = 1, link = %s", [linked])
    audit_log.record(conn, AuditRecord("read", "test"))
    assert audit_log.find_fault(conn) is None
    assert [entry.writer is None for entry in audit_log.find_latest(conn, limit=2)] == [False, True]


def test_a_rolled_back_action_has_no_audit_record(conn: Session) -> None:
    audit_log.record(conn, AuditRecord("delete", "test"))
    conn.rollback()
    assert audit_log.get_head(conn)[0] == 0


def test_concurrent_writers_make_one_chain(database: str) -> None:
    def work(number: int) -> None:
        with connect(database, cipher=NO_ENCRYPTION) as conn:
            for _ in range(20):
                audit_log.record(
                    conn, AuditRecord("read", f"worker {number}"), AuditRecord("update", "nothing", count=0)
                )
                conn.commit()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    with connect(database, cipher=NO_ENCRYPTION) as conn:
        assert audit_log.find_fault(conn) is None
        assert audit_log.get_head(conn)[0] == 80


def test_reading_a_patient_commits_an_audit_record_first(database: str) -> None:
    with connect(database, cipher=CIPHER) as conn:
        record = patient("a", gender="female")
        load(conn, record)
        conn.commit()
        [resource] = read_patient(conn, "a", actor="nurse", request_id="r-1")
        assert resource.body == record.body
        assert read_patient(conn, "unknown", actor="nurse") == []
        conn.rollback()
        one, other = reversed(audit_log.find_latest(conn, limit=10))
        assert (one.audit_record.action, one.audit_record.actor, one.audit_record.request_id) == (
            "decrypt",
            "nurse",
            "r-1",
        )
        assert one.audit_record.subject == CIPHER.subject("Patient", "a") != other.audit_record.subject
        assert [one.audit_record.detail, other.audit_record.detail] == [{"found": 1}, {"found": 0}]
        assert "Patient/a" not in str(select(conn, "SELECT l::text FROM ops.audit_log l"))
