"""Every action on patient data has an audit record in the same transaction: actor, action, subject and context."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from fhir_assets.accounts import find_account
from fhir_assets.api.access import Role, Token
from fhir_assets.api.context import AppContext, Caller
from fhir_assets.api.intake import ingest_fhir, ingest_records
from fhir_assets.api.patients import list_patients, one_patient
from fhir_assets.api.runs import replay_run
from fhir_assets.cli import dead_letters as dead_letters_command
from fhir_assets.cli import patient as patient_command
from fhir_assets.deployment.encryption import build_store_cipher
from fhir_assets.fhir.record import Deletion, build_record, read_header
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.views import CompiledViews
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.pipeline.load.step import LoadStep
from fhir_assets.pipeline.partition_commit import commit_update
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.replay.load_step import ReplayLoadStep
from fhir_assets.pipeline.validate.step import ValidateStep
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.consent import ConsentGate, Policy
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.privacy.keys import new_key, parse_keys
from fhir_assets.settings import Settings, load_settings
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.storage.store import open_store
from fhir_assets.warehouse.exports.export import Export
from fhir_assets.warehouse.lake import writer as lake
from fhir_assets.warehouse.ops import audit_log, dead_letters, encryption_secret, runs, window_verdicts
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.warehouse.postgres.tables import deletions
from fhir_assets.warehouse.postgres.tables.loading import Loader
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables
from fhir_assets_tests.support.consent_records import VIEWS, consent, patient, record
from fhir_assets_tests.support.views import column, view

DAY = datetime(2024, 1, 5, tzinfo=UTC)
KEY = "2024-01-05"
CALLER = Caller(Token("anna", Role.ADMIN, b""), "request-1")
PATIENTS = (view("patient", "Patient", column("id", "id", "id"), column("gender", "gender", "code")), VIEWS[1])
CONSENT = VIEWS[3]
ALL = (*PATIENTS, CONSENT)


class Hospital:
    """A deployment with a patient ``a`` and dead letters of ``b``, and the actions of a test."""

    def __init__(self, url: str, folder: Path, key: str | None) -> None:
        self.folder = folder
        values: dict[str, object] = {"phi_encryption_keys": key} if key else {}
        self.settings: Settings = load_settings(
            db_url=url,
            fhir_assets_home=folder / "home",
            fhir_resource_types="Patient,Observation,Consent",
            fhir_last_updated_gte="2024-01-01",
            **values,
        )
        with connect(url) as conn:
            self.cipher = encryption_secret.unlock(conn, Cipher(parse_keys([key] if key else [])))
        self.environment = {
            "DB_URL": url,
            "FHIR_ASSETS_HOME": str(folder / "home"),
            "FHIR_RESOURCE_TYPES": "Patient,Observation,Consent",
            "FHIR_LAST_UPDATED_GTE": "2024-01-01",
            "PHI_ENCRYPTION_KEYS": key or "",
        }
        self.store = open_store(self.settings.store_url, build_store_cipher(self.settings))
        self.parts = AppContext(self.settings)
        self.target = LocalBlobs(folder / "exports")
        self.url = url

    def connect(self) -> Session:
        return connect(self.url, cipher=self.cipher)

    def receive(self, *resources: dict[str, Any], origin: str = "test:1") -> None:
        """Receive resources into raw."""
        bodies = [
            json.dumps({**resource, "meta": {"lastUpdated": f"{KEY}T10:00:00Z"}}).encode() for resource in resources
        ]
        records = [build_record(body, read_header(body), DAY) for body in bodies]
        types = self.settings.fhir_resource_types
        Receiver(self.store, self.connect, self.settings.window_scheme, types).receive(records, origin)

    def load(self, run_id: str, *, gate: ConsentGate | None = None) -> None:
        """Validate and load the new resources of raw."""
        facts: dict[str, Any] = {"run_id": run_id, "refresh": Refresh.MISSING, "workers": WorkerPool(1)}
        validation = ValidateStep(self.store, Validator(), self.connect, now=DAY, **facts)
        commit_update(self.connect, self.store, validation.run("Patient", [KEY]))
        window = self.settings.window_scheme.window(KEY)
        loading = LoadStep(
            self.store, self.connect, PATIENTS, all_views=True, consent_gate=gate or ConsentGate(), **facts
        )
        loading.run("Patient", [window])

    def add_dead_letter(self, stage: str, identity: str = "b") -> int:
        """Record a dead letter and return its id."""
        body = json.dumps(patient(identity)).encode()
        dead_letter = DeadLetter("Patient", identity, stage, "rule", "Patient", "why", body, KEY)
        with self.connect() as conn:
            runs.start(conn, "failed-run", ["Patient"], [KEY], triggered_by="test", at=DAY)
            dead_letters.record(conn, "failed-run", [dead_letter])
            row = conn.execute("SELECT max(id) FROM ops.dead_letters").fetchone()
            assert row
            return int(row[0])

    def command(self, app: Any, *arguments: str) -> None:
        result = CliRunner().invoke(app, arguments, env=self.environment)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output

    def records(self) -> list[AuditRecord]:
        """Return all audit records, oldest first."""
        with self.connect() as conn:
            assert audit_log.find_fault(conn) is None
            return [entry.audit_record for entry in reversed(audit_log.find_latest(conn, limit=50))]

    def state(self) -> dict[str, list[str]]:
        """Return the state that actions change: rows of tables, and exported files."""
        state = {"files": sorted(self._exported())}
        with self.connect() as conn:
            for table in STATE:
                rows = conn.execute(f"SELECT ({STATE[table]})::text FROM {table} ORDER BY 1".encode()).fetchall()
                state[table] = [row for (row,) in rows]
        return state

    def _exported(self) -> Iterator[str]:
        """Yield the exported files. A window of the lake counts when the state of its view says that it has rows."""
        for path in self.folder.rglob("exports/**/*json"):
            if path.parent.name == "_state":
                yield from (key for key, window in json.loads(path.read_bytes()).items() if window["rows"])
            else:
                yield path.name


STATE = {
    "fhir.resource": "resource_type, id, run_id, resource",
    "fhir.patient_name": "_resource_key, family",
    "ops.received": "origin, resource_type",
    "ops.corrections": "fingerprint, resource",
    "ops.dead_letters": "id, status IN ('resolved', 'discarded'),"
    " replay_requested_at IS NOT NULL AND claimed_by IS NULL",
    "ops.consents": "patient_id, decision",
    "ops.withheld": "resource_type, id",
}


def load_consent(hospital: Hospital, verdict: str, policy: Policy) -> None:
    """Apply the policy and load a Consent of ``a`` without evaluating it."""
    decide_consent(hospital, policy)
    resource = consent("c", "a", {"type": verdict})
    with hospital.connect() as conn:
        ensure_tables(conn, ALL)
        loader = Loader(conn, "Consent", [CONSENT], run_id="run", consent_gate=ConsentGate(policy))
        loader.add([(record(resource), CompiledViews([CONSENT]).rows(resource))], KEY)
        loader.finish()


def decide_consent(hospital: Hospital, policy: Policy) -> None:
    ConsentStep(hospital.connect, ALL, ConsentGate(policy), run_id="run", actor="pipeline").run(DAY)


def export(hospital: Hospital) -> None:
    with closing(hospital.connect()) as conn:
        with Export(
            conn, hospital.store, hospital.target, "", actor="cli:anna", withholding=False, run_id="exported"
        ) as writer:
            writer.for_type("Patient", None).write_valid()
            writer.finish()


def evaluate_window(hospital: Hospital) -> None:
    """Record that the window of the loaded patient reconciles, as its check does after a load."""
    with hospital.connect() as conn:
        window_verdicts.record(conn, "Patient", {KEY: ()}, window_verdicts.read_changes(conn, "Patient", [KEY]))


def update_lake(hospital: Hospital) -> None:
    with closing(hospital.connect()) as conn:
        target = LocalBlobs(hospital.folder / "exports" / "lake")
        lake.update(conn, target, PATIENTS[0], [KEY], run_id="run", actor="schedule")


def delete(hospital: Hospital) -> None:
    with hospital.connect() as conn:
        deletions.apply(conn, [Deletion("Patient", "a", datetime.now(UTC))], run_id="run")


def replay(hospital: Hospital) -> None:
    ReplayLoadStep(hospital.connect, PATIENTS, run_id="replay", also_open=True).run(
        "Patient", [hospital.settings.window_scheme.window(KEY)]
    )


def edit(hospital: Hospital) -> None:
    corrected = hospital.folder / "whole.json"
    corrected.write_text(json.dumps({**patient("b"), "gender": "female"}))
    hospital.command(dead_letters_command.app, "edit", "1", "--resource", str(corrected), "--by", "anna")


@dataclass(frozen=True)
class Case:
    """An action, its preparation and its audit records. ``about`` is ``None`` for an action on many resources."""

    do: Callable[[Hospital], object]
    records: tuple[AuditRecord, ...]
    before: Callable[[Hospital], object] = lambda _: None
    about: str | Callable[["Hospital"], str] | None = None
    keys: bool = True


ANNA = "api:anna"
ME = "cli:<user>"
CASES = {
    "create": Case(
        lambda hospital: hospital.load("load"),
        (AuditRecord("create", "pipeline", "Patient", run_id="load", detail={"windows": 1}),
         AuditRecord("update", "pipeline", "Patient", run_id="load", detail={"windows": 1})),
        before=lambda hospital: hospital.receive(patient("new"), patient("a", active=True), origin="test:2"),
    ),
    "withhold at the load": Case(
        lambda hospital: hospital.load("load", gate=ConsentGate(Policy.OPT_IN)),
        (AuditRecord("withhold", "pipeline", "Patient", run_id="load", detail={"windows": 1}),),
        before=lambda hospital: hospital.receive(patient("new"), origin="test:2"),
    ),
    "delete": Case(delete, (AuditRecord("delete", "pipeline", "Patient", run_id="run"),)),
    "decrypt by the command line": Case(
        lambda hospital: hospital.command(patient_command.app, "show", "a"),
        (AuditRecord("decrypt", ME, "Patient", detail={"found": 1}),),
        about="Patient/a",
    ),
    "decrypt by the API": Case(
        lambda hospital: one_patient(hospital.parts, CALLER, "a"),
        (AuditRecord("decrypt", ANNA, "Patient", request_id="request-1", detail={"found": 1, "refused": False}),),
        about="Patient/a",
    ),
    "read without keys": Case(
        lambda hospital: one_patient(hospital.parts, CALLER, "a"),
        (AuditRecord("read", ANNA, "Patient", request_id="request-1", detail={"found": 1, "refused": False}),),
        about="Patient/a",
        keys=False,
    ),
    "look patients up": Case(
        lambda hospital: list_patients(hospital.parts, CALLER),
        (AuditRecord("decrypt", ANNA, "Patient", request_id="request-1", detail={"page": 1}),),
        about="Patient/a",
    ),
    "create by the API": Case(
        lambda hospital: ingest_fhir(hospital.parts, CALLER, json.dumps(patient("posted")).encode()),
        (AuditRecord("create", ANNA, "Patient", request_id="request-1"),),
        about="Patient/posted",
    ),
    "update by the API": Case(
        lambda hospital: ingest_fhir(hospital.parts, CALLER, json.dumps(patient("a", active=True)).encode()),
        (AuditRecord("update", ANNA, "Patient", request_id="request-1"),),
        about="Patient/a",
    ),
    "create patient records by the API": Case(
        lambda hospital: ingest_records(
            hospital.parts,
            CALLER,
            b'{"records": [{"resourceType": "Patient", "mrn": "1", "consent": {"research": true}}]}',
            "a key",
        ),
        (AuditRecord("create", ANNA, "Consent", request_id="request-1"),
         AuditRecord("create", ANNA, "Patient", request_id="request-1")),
        about=lambda hospital: f"Patient/{hospital.cipher.identity('Patient', '1')}",
    ),
    "export": Case(
        export,
        (AuditRecord("export", "cli:anna", "Patient", run_id="exported", detail={"file": "Patient.valid.ndjson"}),),
    ),
    "export into the lake": Case(
        update_lake,
        (AuditRecord("export", "schedule", "Patient", run_id="run", detail={"file": "lake"}),),
        before=evaluate_window,
    ),
    "replay by the command line": Case(
        lambda hospital: hospital.command(dead_letters_command.app, "replay", "1", "--no-wait"),
        (AuditRecord("replay", ME, None, detail={"waited": False}),),
        before=lambda hospital: hospital.add_dead_letter("validate"),
    ),
    "replay by the API": Case(
        lambda hospital: replay_run(hospital.parts, CALLER, "failed-run"),
        (AuditRecord("replay", ANNA, None, run_id="failed-run", request_id="request-1", detail={"stage": None}),),
        before=lambda hospital: hospital.add_dead_letter("validate"),
    ),
    "what a replay loads": Case(
        replay,
        (AuditRecord("create", "pipeline", "Patient", run_id="replay", detail={"replay": True}),),
        before=lambda hospital: hospital.add_dead_letter("load"),
    ),
    "edit": Case(
        edit,
        (AuditRecord("edit", ME, "Patient", detail={"dead_letter": 1}, claim="anna"),),
        before=lambda hospital: hospital.add_dead_letter("validate"),
        about="Patient/b",
    ),
    "discard": Case(
        lambda hospital: hospital.command(dead_letters_command.app, "discard", "1", "--reason", "no", "--by", "anna"),
        (AuditRecord("discard", ME, claim="anna"),),
        before=lambda hospital: hospital.add_dead_letter("validate"),
    ),
    "decrypt a dead letter": Case(
        lambda hospital: hospital.command(dead_letters_command.app, "show", "1", "--resource"),
        (AuditRecord("decrypt", ME, "Patient", detail={"dead_letter": 1}),),
        before=lambda hospital: hospital.add_dead_letter("validate"),
        about="Patient/b",
    ),
    "decide, and withhold": Case(
        lambda hospital: decide_consent(hospital, Policy.OPT_OUT),
        (AuditRecord("consent decision", "pipeline", "Consent", count=2, run_id="run"),
         AuditRecord("withhold", "pipeline", "Consent", run_id="run"),
         AuditRecord("withhold", "pipeline", "Patient", run_id="run")),
        before=lambda hospital: load_consent(hospital, "deny", Policy.OPT_OUT),
    ),
    "decide, and release": Case(
        lambda hospital: decide_consent(hospital, Policy.OPT_IN),
        (AuditRecord("consent decision", "pipeline", "Consent", count=2, run_id="run"),
         AuditRecord("release", "pipeline", "Consent", run_id="run"),
         AuditRecord("release", "pipeline", "Patient", run_id="run")),
        before=lambda hospital: load_consent(hospital, "permit", Policy.OPT_IN),
    ),
}  # fmt: skip
"""Key rotation has its own tests."""

REFUSE_COMMITS = """
    CREATE FUNCTION public.refuse_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        RAISE EXCEPTION 'this transaction is not going to be committed' USING ERRCODE = 'check_violation';
    END $$;
    CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON ops.audit_log DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION public.refuse_commit()
"""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_action_and_its_audit_records_are_committed_in_one_transaction(
    case: Case, database: str, tmp_path: Path
) -> None:
    hospital = Hospital(database, tmp_path, new_key() if case.keys else None)
    hospital.receive(patient("a"))
    hospital.load("first")
    case.before(hospital)
    before, known = hospital.state(), hospital.records()

    with connect(database) as conn:
        conn.execute(REFUSE_COMMITS.encode())
    with pytest.raises(psycopg.errors.CheckViolation):
        case.do(hospital)
    assert hospital.records() == known
    assert hospital.state() == before
    with connect(database) as conn:
        conn.execute("DROP FUNCTION public.refuse_commit CASCADE")

    case.do(hospital)
    new_records = sorted((_without_user(audit_record) for audit_record in hospital.records()[len(known) :]), key=_order)
    about = case.about(hospital) if callable(case.about) else case.about
    subject = hospital.cipher.subject(*about.split("/")) if about else None
    assert new_records == [replace(audit_record, subject=subject) for audit_record in case.records]
    assert subject is None or subject not in ("Patient/a", "a")
    hospital.parts.close()
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


def _order(audit_record: AuditRecord) -> tuple[str, str]:
    return audit_record.action, audit_record.resource_type or ""


def _without_user(audit_record: AuditRecord) -> AuditRecord:
    return (
        replace(audit_record, actor=audit_record.actor.replace(find_account(), "<user>"))
        if audit_record.actor.startswith("cli:")
        else audit_record
    )


def test_a_run_that_changes_nothing_leaves_no_audit_record(database: str, tmp_path: Path) -> None:
    hospital = Hospital(database, tmp_path, new_key())
    hospital.receive(patient("a"))
    hospital.load("first")
    known = hospital.records()
    decide_consent(hospital, Policy.OFF)
    hospital.load("nothing")
    replay(hospital)
    assert hospital.records() == known
