"""A small deployment whose operations are called directly, without Dagster, for tests of two operations at once.

It has one window of Patients: ``valid`` ones, and two whose gender is invalid.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fhir_assets.fhir.record import Deletion, build_record, read_header
from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.pipeline.correct.step import Correction, CorrectionStep
from fhir_assets.pipeline.deletions.deletion_log import DeletionLog
from fhir_assets.pipeline.load.conditional_references import ConditionalReferenceStep
from fhir_assets.pipeline.load.step import LoadStep
from fhir_assets.pipeline.partition_commit import commit_update
from fhir_assets.pipeline.receive.receiver import Receiver
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts, find_main_view, reconcile
from fhir_assets.pipeline.reencrypt.step import ReencryptStep
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.replay.load_step import ReplayLoadStep
from fhir_assets.pipeline.replay.validate_step import ReplayValidateStep, find_outdated_partitions
from fhir_assets.pipeline.validate.step import ValidatedUpdate, ValidateStep
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.privacy.encryption import NO_ENCRYPTION, Cipher
from fhir_assets.storage.orphans import find_unreferenced_parts
from fhir_assets.storage.store import Store, open_store
from fhir_assets.warehouse.ops import dead_letters, liveness, replays, retention, runs
from fhir_assets.warehouse.ops.dead_letters import Selection, StoredDeadLetter
from fhir_assets.warehouse.postgres.db.connections import Session, connect
from fhir_assets.windows import Granularity, WindowScheme
from fhir_assets_tests.support.consent_records import VIEWS as CONSENT_VIEWS

DAY = datetime(2024, 1, 5, tzinfo=UTC)
NOW = datetime(2024, 12, 31, 12, tzinfo=UTC)
KEY = "2024-01-05"
TYPES = ("Patient", "Consent", "Observation")
NO_GATE = ConsentGate()


def build_patient(
    identity: str, *, gender: str = "male", version: int = 1, day: datetime = DAY, **fields: Any
) -> dict[str, Any]:
    """Return a Patient of the window of a day; each version is one minute later."""
    moment = day + timedelta(hours=1, minutes=version)
    return {
        "resourceType": "Patient",
        "id": identity,
        "meta": {"versionId": str(version), "lastUpdated": moment.isoformat()},
        "gender": gender,
        "name": [{"family": f"F{identity}"}],
        **fields,
    }


class NotDone(Exception):
    """An operation says that it did nothing, and has to be repeated."""


class SmallHospital:
    """A store and a database, with the operations that change resources."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        cipher: Cipher = NO_ENCRYPTION,
        gate: ConsentGate = NO_GATE,
        day: datetime = DAY,
    ) -> None:
        self.url = url
        self.cipher = cipher
        self.gate = gate
        self.day = day
        self.key = f"{day:%Y-%m-%d}"
        self.store: Store = open_store(str(folder / "store"), cipher)
        self.scheme = WindowScheme(Granularity.DAILY, datetime(2024, 1, 1, tzinfo=UTC), open_start=False)
        self.views: Sequence[View] = CONSENT_VIEWS

    @contextmanager
    def connect(self) -> Iterator[Session]:
        """Open a session, as ``Warehouse.connect`` does."""
        with connect(self.url, cipher=self.cipher) as session:
            yield session

    @contextmanager
    def live_run(self, run_id: str) -> Iterator[None]:
        """Mark a run as alive for the block, and record its window as running."""
        with connect(self.url, autocommit=True) as conn:
            liveness.hold_liveness_lock(conn, run_id)
            runs.start(conn, run_id, ["Patient"], [self.key], triggered_by="test", at=NOW)
            yield
            runs.finish(conn, run_id, ["Patient"], [self.key])

    def receive(self, *resources: dict[str, Any], origin: str) -> None:
        """Receive resources into raw."""
        bodies = [json.dumps(resource).encode() for resource in resources]
        records = [build_record(body, read_header(body), NOW) for body in bodies]
        self.receiver().receive(records, origin)

    def receiver(self) -> Receiver:
        """Return the receiver of all channels but the source."""
        return Receiver(self.store, self.connect, self.scheme, TYPES, now=lambda: NOW)

    def validate(self, run_id: str, *, refresh: Refresh = Refresh.WINDOW, resource_type: str = "Patient") -> None:
        """Validate the window and commit it."""
        update = self.build_validate_step(run_id, refresh).run(resource_type, [self.key])
        commit_update(self.connect, self.store, update)

    def build_validate_step(self, run_id: str, refresh: Refresh) -> ValidateStep:
        """Return the step that validates."""
        return ValidateStep(
            self.store, Validator(), self.connect, run_id=run_id, now=NOW, refresh=refresh, workers=WorkerPool(1)
        )

    def load_tables(self, run_id: str, *, refresh: Refresh = Refresh.WINDOW, resource_type: str = "Patient") -> None:
        """Load the validated window into the tables."""
        views = [view for view in self.views if view.resource_type == resource_type]
        step = LoadStep(
            self.store,
            self.connect,
            views,
            all_views=True,
            run_id=run_id,
            refresh=refresh,
            workers=WorkerPool(1),
            consent_gate=self.gate,
        )
        step.run(resource_type, [self.scheme.window(self.key)])

    def load(self, run_id: str = "load", *, refresh: Refresh = Refresh.WINDOW) -> None:
        """Validate the whole window and load it."""
        with self.live_run(run_id):
            self.validate(run_id, refresh=refresh)
            self.load_tables(run_id, refresh=refresh)

    def load_consents(self, run_id: str = "consents") -> None:
        """Validate and load what is new among the Consents of the window, whose decisions then are due."""
        with self.live_run(run_id):
            self.validate(run_id, refresh=Refresh.MISSING, resource_type="Consent")
            self.load_tables(run_id, refresh=Refresh.MISSING, resource_type="Consent")

    def extend(self, run_id: str = "extension") -> None:
        """Validate and load what is new in the window."""
        self.load(run_id, refresh=Refresh.MISSING)

    def replay(self, run_id: str = "replay") -> None:
        """Replay all open dead letters of the window."""
        with self.live_run(run_id):
            with self.connect() as conn:
                replays.request_replay(conn, Selection(partition_keys=[self.key]), claimed_by=run_id)
            self.replay_claimed(run_id)

    def replay_claimed(self, run_id: str) -> None:
        """Replay the dead letters that a run has claimed, as the assets do."""
        raw = self.store.manifests("raw", "Patient", [self.key])
        with self.connect() as conn:
            outdated = find_outdated_partitions(conn, self.store, "Patient", raw)
        update: ValidatedUpdate
        if outdated:
            update = self.build_validate_step(run_id, Refresh.MISSING).run("Patient", outdated, revalidated=outdated)
        else:
            step = ReplayValidateStep(self.store, Validator(), self.connect, run_id=run_id, now=NOW, also_open=False)
            update = step.run("Patient", [self.key]).update
        commit_update(self.connect, self.store, update)
        self.load_tables(run_id, refresh=Refresh.MISSING)
        views = [view for view in self.views if view.resource_type == "Patient"]
        ReplayLoadStep(self.connect, views, run_id=run_id, also_open=False, consent_gate=self.gate).run(
            "Patient", [self.scheme.window(self.key)]
        )
        with self.connect() as conn:
            replays.release_claims(conn, run_id)

    def correct(self, identity: str, **fields: Any) -> None:
        """Correct the dead letter of a patient by hand."""
        letter = self.find_dead_letter(identity)
        body = json.dumps(build_patient(identity, day=self.day, **fields)).encode()
        CorrectionStep(self.connect, Validator(), self.receiver()).run(
            letter.id, Correction(None, body, "anna", actor="cli:anna")
        )

    def discard(self, *identities: str) -> None:
        """Discard the dead letters of patients."""
        ids = [self.find_dead_letter(identity).id for identity in identities]
        with self.connect() as conn:
            if replays.discard(conn, Selection(ids=ids), reason="no", by="anna") < len(ids):
                raise NotDone("a run replays the dead letter")

    def delete(self, *identities: str) -> None:
        """Apply deletions of patients that the source made after every version."""
        deletions = [Deletion("Patient", identity, NOW, "9") for identity in identities]
        DeletionLog(self.store, self.connect, now=lambda: NOW).record(deletions, run_id="deletions")

    def prune(self) -> None:
        """Remove resolved dead letters and unreferenced parts, as `fhir-assets prune` does for a time to come."""
        with self.connect() as conn:
            running = retention.find_oldest_running(conn)
            before = running - timedelta(hours=1) if running else datetime.now(UTC) + timedelta(hours=1)
            conn.commit()
            retention.delete_expired_rows(conn, "dead_letters", datetime.now(UTC))
        for layer in ("raw", "validated", "deleted"):
            for file in list(find_unreferenced_parts(self.store, layer, before=before)):
                self.store.blobs.delete(file.name)

    def resolve_references(self, run_id: str = "references") -> int:
        """Resolve the conditional references that wait."""
        return ConditionalReferenceStep(self.connect, self.views, run_id=run_id, consent_gate=self.gate).run()

    def apply_consent(self, run_id: str = "consent") -> None:
        """Apply the consents that are due."""
        ConsentStep(self.connect, self.views, self.gate, run_id=run_id, actor="test").run(NOW)

    def rotate(self) -> int:
        """Re-encrypt everything with the newest key, and return the number of items that are left."""
        step = ReencryptStep(self.connect, self.store, self.views, actor="test", busy_timeout=1)
        return step.run().left_over

    def _select(self, conn: Session, query: str, column: str) -> list[tuple[Any, ...]]:
        """Return the rows of the stored patients of the window, in the order of their ids."""
        stored = """
            IN (
                SELECT id
                FROM fhir.resource
                WHERE resource_type = 'Patient' AND partition_key = %s AND deleted_at IS NULL
            )
        """
        return conn.execute(f"{query} WHERE {column} {stored} ORDER BY 1".encode(), [self.key]).fetchall()

    def find_dead_letters(self) -> list[StoredDeadLetter]:
        """Return the dead letters of the window."""
        with self.connect() as conn:
            return dead_letters.find(conn, Selection(partition_keys=[self.key]))

    def find_dead_letter(self, identity: str) -> StoredDeadLetter:
        """Return the dead letter of a patient."""
        (letter,) = [letter for letter in self.find_dead_letters() if letter.resource_id == identity]
        return letter

    def find_unresolved(self) -> set[str | None]:
        """Return the ids of the patients whose dead letters are not resolved."""
        return {letter.resource_id for letter in self.find_dead_letters() if letter.status != "resolved"}

    def find_loaded(self) -> dict[str, str]:
        """Return the genders of the patients in the tables; fail if a table has a patient twice or not at all."""
        with self.connect() as conn:
            rows = self._select(conn, "SELECT p._resource_key, p.gender FROM fhir.patient p", "p._resource_key")
            names = self._select(conn, "SELECT n._resource_key FROM fhir.patient_name n", "n._resource_key")
            resources = self._select(conn, "SELECT id FROM fhir.resource", "id")
        loaded = dict(rows)
        assert [key for key, _ in rows] == [key for (key,) in names] == [key for (key,) in resources]
        return loaded

    def find_withheld(self) -> set[str]:
        """Return the ids of the patients that consent withholds."""
        with self.connect() as conn:
            rows = conn.execute("SELECT id FROM ops.withheld WHERE partition_key = %s", [self.key])
            return {key for (key,) in rows}

    def count_window(self) -> WindowCounts:
        """Return the counts of the window."""
        with self.connect() as conn:
            (counts,) = reconcile(
                conn, self.store, "Patient", [self.key], main_view=find_main_view(self.views, "Patient")
            )
        return counts


Operation = Callable[[SmallHospital], None]
