"""Dead letters judged again: only their own lines, not their windows.

What heals becomes a further part of the validated partition, beside the tallies that are mended, and goes on from there
as any other part does. The manifest names the run (``replay:<run>``), so that a replay that was cut short after its
commit is not done twice: a letter that is still held by a run which the manifest names has healed.
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
from fhir_assets.warehouse.ops import replays
from fhir_assets.warehouse.ops.replays import Claimed, Failed
from fhir_assets.warehouse.postgres.db.connections import OpenSession

STAGE = "validate"


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What became of the letters: ``update`` is not yet visible; by partition key, how many healed and failed."""

    update: ValidatedUpdate
    resolved: Counter[str]
    failed: Counter[str]


class ReplayValidateStep:
    """Judges the letters of stage ``validate`` that a run claims in validated partitions of one type."""

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

    def behind(self, resource_type: str, raw: Sequence[Manifest]) -> list[Manifest]:
        """Those raw partitions that are not validated as they are now: all of them has to be judged, which judges
        their letters too.
        """
        found = []
        for manifest in raw:
            existing = self._store.manifest("validated", resource_type, manifest.partition_key)
            names = {part.name for part in manifest.parts}
            if existing is None or existing.validated is None or existing.validated.raw_parts != names:
                found.append(manifest)
        return found

    @infrequent_gc()
    def run(self, resource_type: str, partition_keys: Sequence[str]) -> ReplayResult:
        """Judge the letters of some partitions; the caller commits the manifests of those where some healed.

        What fails again is open again when this returns. Raises StoreError, DatabaseUnavailable or SealingError.
        """
        manifests = {m.partition_key: m for m in self._store.manifests("validated", resource_type, partition_keys)}
        tallies = {key: _Tally() for key in manifests}
        with self._connect() as conn:
            healed_by = {key: m.validated.replays if m.validated else [] for key, m in manifests.items()}
            replays.claim(conn, self._run_id, resource_type, [STAGE], healed_by, also_open=self._also_open)
            replays.note_origin(conn, self._run_id, resource_type, partition_keys)
            conn.commit()
        with self._connect() as reading, self._connect() as writing:
            with PartWriter(self._store, "validated") as writer:
                for letters in replays.claimed(reading, self._run_id, resource_type, [STAGE], list(manifests)):
                    failed = self._judge(resource_type, letters, tallies, writer)
                    replays.failed(writing, self._run_id, failed)
                    writing.commit()
                parts = writer.finish()
        changed = [key for key, tally in tallies.items() if tally.letters]
        update = ValidatedUpdate(
            resource_type,
            tuple(self._manifest(manifests[key], tallies[key], parts.get((resource_type, key), ())) for key in changed),
            (),
            {key: manifests[key] for key in changed},
        )
        failures = Counter({key: tallies[key].failed for key in changed})
        return ReplayResult(update, Counter({key: tallies[key].letters for key in changed}) - failures, failures)

    def _judge(
        self, resource_type: str, letters: Sequence[Claimed], tallies: dict[str, "_Tally"], writer: PartWriter
    ) -> list[Failed]:
        failed = []
        for letter in letters:
            tally = tallies[letter.partition_key]
            tally.letters += 1
            tally.dead[letter.rule] -= letter.occurrences
            verdict = self._validator.check(letter.body)
            if verdict.valid:
                for _ in range(letter.occurrences):
                    writer.add(resource_type, letter.partition_key, letter.body, None)
                tally.warnings.update(issue.rule for issue in verdict.issues)
                continue
            again = build_dead_letter(
                resource_type, letter.partition_key, letter.body, verdict, ruleset=self._validator.ruleset
            )
            tally.failed += 1
            tally.dead[again.rule] += letter.occurrences
            failed.append(Failed(letter.id, again.rule, again.path, again.message, again.issues, again.ruleset))
        return failed

    def _manifest(self, base: Manifest, tally: "_Tally", parts: tuple[Part, ...]) -> Manifest:
        before = base.validated
        assert before is not None
        tally.dead.update(before.dead)
        tally.warnings.update(before.warnings)
        return Manifest(
            base.layer,
            base.resource_type,
            base.partition_key,
            self._run_id,
            self._now,
            base.parts + parts,
            validated=Validated(
                (*before.inputs, REPLAY + self._run_id),
                before.rules_version,
                before.rows_in,
                {rule: count for rule, count in tally.dead.items() if count},
                dict(tally.warnings),
            ),
        )


class _Tally:
    """What judging the letters of a partition changes."""

    def __init__(self) -> None:
        self.letters = 0
        self.failed = 0
        self.dead: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
