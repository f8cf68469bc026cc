"""Replays dead letters of the stage ``validate``: validates their stored resources again, not whole windows.

Resources that are valid now become an additional part of the validated partition, whose counts are corrected, and are
loaded like any other part. The manifest names the replay run (``replay:<run>``) as an input, so that dead letters are
not replayed twice if the run stops after its commit: a dead letter that was claimed by a run in the manifest is
resolved.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from fhir_assets.fhir.validation import Validator
from fhir_assets.pipeline.validate.step import ValidatedUpdate, build_dead_letter
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.storage.manifest import REPLAY, Manifest, Part, Validated
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import dead_letter_resolution, replays
from fhir_assets.warehouse.ops.replays import ClaimedDeadLetter, FailedReplay
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession

STAGE = "validate"


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The uncommitted update of the validated partitions, and the numbers of resolved and failed dead letters.

    The numbers are by partition key.
    """

    update: ValidatedUpdate
    resolved: Counter[str]
    failed: Counter[str]


def find_outdated_partitions(conn: Connection, store: Store, resource_type: str, raw: Sequence[Manifest]) -> list[str]:
    """Return the keys of the raw partitions that a replay has to validate completely, with their dead letters.

    These have parts that are not validated yet, or more dead letters than their validated partition counts, because a
    load is recording dead letters at this moment or was killed before it committed the partition. If a dead letter that
    the partition does not count were replayed, its resource would be stored twice.
    """
    existing = {m.partition_key: m for m in store.manifests("validated", resource_type, [m.partition_key for m in raw])}
    replayed_by = {run for m in existing.values() if m.validated for run in m.validated.replays}
    dead = dead_letter_resolution.count_dead(conn, resource_type, list(existing), replayed_by=sorted(replayed_by))
    outdated = []
    for manifest in raw:
        key = manifest.partition_key
        state = existing[key].validated if key in existing else None
        names = {part.name for part in manifest.parts}
        if state is None or state.raw_parts != names or dead.get(key, 0) > sum(state.dead.values()):
            outdated.append(key)
    return outdated


class ReplayValidateStep:
    """Validates the dead letters of stage ``validate`` that a run claims in validated partitions of one type.

    With ``also_open`` the run claims all open dead letters, not only those that were marked for a replay.
    """

    def __init__(
        self,
        store: Store,
        validator: Validator,
        connect: OpenSession,
        *,
        run_id: str,
        now: datetime,
        also_open: bool,
    ) -> None:
        self._store = store
        self._validator = validator
        self._connect = connect
        self._run_id = run_id
        self._now = now
        self._also_open = also_open

    @infrequent_gc()
    def run(self, resource_type: str, partition_keys: Sequence[str]) -> ReplayResult:
        """Validate the claimed dead letters of some partitions. The caller commits the manifests.

        Dead letters that fail again are open again afterwards. Raises StoreError, DatabaseUnavailable or
        EncryptionError.
        """
        manifests = {m.partition_key: m for m in self._store.manifests("validated", resource_type, partition_keys)}
        changes = {key: _PartitionChange() for key in manifests}
        with self._connect() as conn:
            replay_runs = {key: m.validated.replays if m.validated else [] for key, m in manifests.items()}
            replays.claim(conn, self._run_id, resource_type, [STAGE], replay_runs, also_open=self._also_open)
            replays.record_origin(conn, self._run_id, resource_type, partition_keys)
            conn.commit()
        with self._connect() as reading, self._connect() as writing:
            with PartWriter(self._store, "validated") as writer:
                for batch in replays.stream_claimed(reading, self._run_id, resource_type, [STAGE], list(manifests)):
                    failed = self._validate(resource_type, batch, changes, writer)
                    replays.record_failures(writing, self._run_id, failed)
                    writing.commit()
                parts = writer.finish()
        changed = [key for key, change in changes.items() if change.dead_letters]
        update = ValidatedUpdate(
            resource_type,
            tuple(
                self._build_manifest(manifests[key], changes[key], parts.get((resource_type, key), ()))
                for key in changed
            ),
            {key: manifests[key] for key in changed},
        )
        failures = Counter({key: changes[key].failed for key in changed})
        return ReplayResult(update, Counter({key: changes[key].dead_letters for key in changed}) - failures, failures)

    def _validate(
        self,
        resource_type: str,
        dead_letters: Sequence[ClaimedDeadLetter],
        changes: dict[str, "_PartitionChange"],
        writer: PartWriter,
    ) -> list[FailedReplay]:
        """Write the resources that are valid now, and return the dead letters that failed again."""
        failed = []
        for dead_letter in dead_letters:
            key = dead_letter.partition_key
            change = changes[key]
            change.dead_letters += 1
            change.dead[dead_letter.rule] -= dead_letter.occurrences
            result = self._validator.check(dead_letter.body)
            if result.valid:
                for _ in range(dead_letter.occurrences):
                    writer.add(
                        resource_type,
                        key,
                        dead_letter.body,
                        None,
                        arrived=dead_letter.arrived,
                        dated=dead_letter.dated,
                    )
                change.warnings.update(issue.rule for issue in result.issues)
                continue
            new = build_dead_letter(resource_type, key, dead_letter.body, result, ruleset=self._validator.ruleset)
            change.failed += 1
            change.dead[new.rule] += dead_letter.occurrences
            failed.append(FailedReplay(dead_letter.id, new.rule, new.path, new.message, new.issues, new.ruleset))
        return failed

    def _build_manifest(self, base: Manifest, change: "_PartitionChange", parts: tuple[Part, ...]) -> Manifest:
        validated = base.validated
        assert validated is not None
        change.dead.update(validated.dead)
        change.warnings.update(validated.warnings)
        return Manifest(
            base.layer,
            base.resource_type,
            base.partition_key,
            self._run_id,
            self._now,
            base.parts + parts,
            validated=Validated(
                (*validated.inputs, REPLAY + self._run_id),
                validated.rules_version,
                validated.rows_in,
                {rule: count for rule, count in change.dead.items() if count},
                dict(change.warnings),
                validated.complete_run,
            ),
        )


class _PartitionChange:
    """How a replay changes the counts of one validated partition."""

    def __init__(self) -> None:
        self.dead_letters = 0
        self.failed = 0
        self.dead: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
