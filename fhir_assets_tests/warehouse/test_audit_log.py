"""The audit log: append-only, in one chain, and on record together with the deed or not at all."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import sql
from typer.testing import CliRunner

from fhir_assets.cli.audit import app
from fhir_assets.privacy.audit import AuditRecord, Fault
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
    """What only the owner of the tables can do."""
    conn.execute("ALTER TABLE ops.audit_log DISABLE TRIGGER USER")
    conn.execute(sql.SQL(statement))
    conn.execute("ALTER TABLE ops.audit_log ENABLE TRIGGER USER")


def test_a_log_that_nobody_touched_is_whole(log: Session) -> None:
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
def test_an_altered_record_is_found(log: Session, change: str) -> None:
    tamper(log, f"UPDATE ops.audit_log SET {change} WHERE seq = 4")
    assert audit_log.find_fault(log) == Fault(4, "altered")


@pytest.mark.parametrize("seq", [1, 5, 10])
def test_a_deleted_record_is_found_also_the_last_one(log: Session, seq: int) -> None:
    tamper(log, f"DELETE FROM ops.audit_log WHERE seq = {seq}")
    assert audit_log.find_fault(log) == Fault(seq, "missing")


def test_an_inserted_record_is_found(log: Session) -> None:
    copied = "action, actor, resource_type, subject, count, run_id, request_id, detail, keyed, link"
    tamper(
        log, f"INSERT INTO ops.audit_log (seq, at, {copied}) SELECT 11, at, {copied} FROM ops.audit_log WHERE seq = 3"
    )
    assert audit_log.find_fault(log) == Fault(11, "inserted")


def test_a_record_pushed_in_between_is_found(log: Session) -> None:
    copied = "action, actor, resource_type, subject, count, run_id, request_id, detail, keyed, link"
    tamper(
        log,
        "UPDATE ops.audit_log SET seq = -seq WHERE seq > 5;"
        "UPDATE ops.audit_log SET seq = -seq + 1 WHERE seq < 0;"
        f"INSERT INTO ops.audit_log (seq, at, {copied}) SELECT 6, at, {copied} FROM ops.audit_log WHERE seq = 3",
    )
    assert audit_log.find_fault(log) == Fault(6, "altered")


def test_who_lacks_the_keys_cannot_mend_the_chain(database: str) -> None:
    with connect(database, autocommit=True, cipher=CIPHER) as conn:
        audit_log.record(conn, AuditRecord("read", "test"), AuditRecord("export", "thief", count=1000))
    with connect(database, autocommit=True, cipher=NO_ENCRYPTION) as conn:
        tamper(conn, "DELETE FROM ops.audit_log WHERE seq = 2")
        conn.execute("UPDATE ops.audit_head h SET seq = 1, link = l.link FROM ops.audit_log l WHERE l.seq = 1")
        audit_log.record(conn, AuditRecord("read", "nobody"))
    with connect(database, autocommit=True, cipher=CIPHER) as conn:
        assert audit_log.find_fault(conn) == Fault(2, "altered")


def verified(url: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and words of `fhir-assets audit verify`."""
    found = CliRunner().invoke(app, ["verify", "--json", *arguments], env={"DB_URL": url})
    return found.exit_code, json.loads(found.stdout)


def test_the_command_finds_what_was_changed_and_what_was_cut_off_since_it_was_noted(database: str) -> None:
    with connect(database, autocommit=True, cipher=NO_ENCRYPTION) as conn:
        audit_log.record(conn, *(AuditRecord("read", f"test {number}") for number in range(5)))
        code, said = verified(database)
        assert (code, said["records"], said["fault"]) == (0, 5, None)
        noted = f"5:{said['link']}"
        audit_log.record(conn, AuditRecord("read", "later"))
        assert verified(database, "--noted", noted)[0] == 0
        # The end cut off, the head brought in line, and other records in its place: the chain is whole, and another.
        tamper(conn, "DELETE FROM ops.audit_log WHERE seq > 3")
        conn.execute("UPDATE ops.audit_head h SET seq = 3, link = l.link FROM ops.audit_log l WHERE l.seq = 3")
        assert verified(database)[0] == 0
        assert verified(database, "--noted", noted)[1]["fault"] == {"seq": 5, "what": "missing"}
        audit_log.record(conn, AuditRecord("read", "forged"), AuditRecord("read", "forged"))
        assert verified(database, "--noted", noted) == (
            1,
            {**verified(database)[1], "fault": {"seq": 5, "what": "altered"}},
        )
        tamper(conn, "UPDATE ops.audit_log SET actor = 'another' WHERE seq = 2")
        assert verified(database)[0] == 1
        assert verified(database)[1]["fault"] == {"seq": 2, "what": "altered"}


def test_records_from_before_the_first_key_stay_true(database: str) -> None:
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
def test_the_log_can_only_be_appended_to(log: Connection, statement: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        log.execute(statement.encode())


def test_a_deed_that_was_undone_is_not_on_record(conn: Session) -> None:
    audit_log.record(conn, AuditRecord("delete", "test"))
    conn.rollback()
    assert audit_log.get_head(conn)[0] == 0


def test_many_at_once_make_one_chain(database: str) -> None:
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


def test_reading_a_patient_is_on_record_before_it_is_given(database: str) -> None:
    with connect(database, cipher=CIPHER) as conn:
        record = patient("a", gender="female")
        load(conn, record)
        conn.commit()
        [found] = read_patient(conn, "a", actor="nurse", request_id="r-1")
        assert found.body == record.body
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
