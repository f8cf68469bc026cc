"""Validates raw partitions: copies valid resources byte for byte, and records invalid ones as dead letters."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice

from fhir_assets.fhir.record import MalformedResource, read_header
from fhir_assets.fhir.validation import Issue, ValidationResult, Validator
from fhir_assets.pipeline.dead_letter_buffer import DeadLetterBuffer
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.storage.manifest import REPLAY, Manifest, Part, Validated
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import LineBatch, Store
from fhir_assets.warehouse.ops import dead_letter_resolution, dead_letters
from fhir_assets.warehouse.ops.corrections import Corrections
from fhir_assets.warehouse.ops.dead_letter_resolution import DeadLetterResolution
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import OpenSession


@dataclass(frozen=True, slots=True)
class ValidatedCounts:
    """The resources of a window that one step validated: valid ones and new dead letters."""

    valid: int
    dead: int


@dataclass(frozen=True, slots=True)
class ValidatedUpdate:
    """The new validated partitions of one resource type, with manifests to commit."""

    resource_type: str
    manifests: tuple[Manifest, ...]
    base_manifests: Mapping[str, Manifest | None]
    """By partition key, the manifest in the store from which the update was built, or None if there was none (see
    pipeline.partition_commit).
    """
    counts: Mapping[str, ValidatedCounts] = field(default_factory=dict)
    """By partition key, the numbers of resources that this step validated; the manifests count the whole partition."""
    resolution: DeadLetterResolution | None = None
    """The dead letters of completely validated partitions, which the commit of the manifests resolves."""


_BYTES_PER_SECOND = 50e6
"""The approximate speed of one process, which determines whether worker processes are started."""

LineIssues = list[tuple[int, tuple[Issue, ...]]]
"""The lines of a batch that have issues, each as its index in the batch and its issues."""


@dataclass(frozen=True)
class LineValidator:
    """Validates a batch of lines. Instances are sent to worker processes."""

    validator: Validator

    def __call__(self, lines: list[bytes]) -> LineIssues:
        """Return the index and the issues of each line that has any."""
        check = self.validator.check
        return [(index, result.issues) for index, line in enumerate(lines) if (result := check(line)).issues]


class ValidateStep:
    """Validates raw partitions, one resource type for each call."""

    def __init__(
        self,
        store: Store,
        validator: Validator,
        connect: OpenSession,
        *,
        run_id: str,
        now: datetime,
        refresh: Refresh,
        workers: WorkerPool,
    ) -> None:
        self._store = store
        self._connect = connect
        self._validator = validator
        self._workers = workers
        self._run_id = run_id
        self._now = now
        self._refresh = refresh
        self._dead_letters = DeadLetterBuffer(lambda batch: dead_letters.record_now(connect, run_id, batch))

    @infrequent_gc()
    def run(
        self, resource_type: str, partition_keys: Sequence[str], *, revalidated: Collection[str] = ()
    ) -> ValidatedUpdate:
        """Validate the new parts of the raw partitions, or all parts if ``refresh`` or changed rules require it.

        All parts of the partitions in ``revalidated`` are validated in any case. The step first takes the record number
        of its dead letters and then reads the manifests. A dead letter with a smaller number is therefore about a
        resource that this step validates, and may be resolved. Dead letters are written before this method returns. The
        caller commits the manifests.

        Raises StoreError, DatabaseUnavailable or WorkerLost; the partitions are unchanged then.
        """
        recorded_before = dead_letter_resolution.next_record_number(self._connect)
        raw = self._store.manifests("raw", resource_type, partition_keys)
        states = list(self._find_states(resource_type, raw, revalidated))
        corrections = Corrections(
            self._connect, resource_type, ["validate"], [state.raw.partition_key for state in states]
        )
        results = self._workers.map(
            LineValidator(self._validator),
            (
                ((state, batch), batch.lines)
                for state in states
                for batch in self._store.batches_with_arrivals(state.pending)
            ),
            weigh=lambda lines: sum(map(len, lines)),
            seconds=sum(part.bytes for state in states for part in state.pending) / _BYTES_PER_SECOND,
        )
        with PartWriter(self._store, "validated") as writer:
            for (state, batch), _, line_issues in results:
                self._store_batch(state, batch, line_issues, corrections, writer)
            self._dead_letters.flush()
            parts = writer.finish()
        counts = {state.raw.partition_key: state.counts for state in states}
        completed = [state.raw.partition_key for state in states if state.base is None]
        return ValidatedUpdate(
            resource_type,
            tuple(
                self._build_manifest(state, parts.get((resource_type, state.raw.partition_key), ())) for state in states
            ),
            {state.raw.partition_key: state.existing for state in states},
            counts,
            DeadLetterResolution(self._run_id, resource_type, "validate", completed, recorded_before),
        )

    def _find_states(
        self, resource_type: str, raw: Sequence[Manifest], revalidated: Collection[str]
    ) -> Iterator["_PartitionState"]:
        """Yield the partitions that have parts to validate, or that do not exist yet."""
        keys = [manifest.partition_key for manifest in raw]
        existing_by_key = {m.partition_key: m for m in self._store.manifests("validated", resource_type, keys)}
        for manifest in raw:
            existing = existing_by_key.get(manifest.partition_key)
            base = None if manifest.partition_key in revalidated else self._find_base(manifest, existing)
            done = base.validated.inputs if base and base.validated else ()
            pending = [part for part in manifest.parts if part.name not in done]
            if base is None or pending:
                yield _PartitionState(manifest, existing, base, pending)

    def _find_base(self, raw: Manifest, existing: Manifest | None) -> Manifest | None:
        """Return ``existing`` if only new raw parts have to be validated, or None if all parts have to be validated."""
        if existing is None or existing.validated is None or self._refresh is not Refresh.MISSING:
            return None
        if existing.validated.rules_version != self._validator.rules_version:
            return None
        names = {part.name for part in raw.parts}
        return existing if names.issuperset(existing.validated.raw_parts) else None

    def _store_batch(
        self,
        state: "_PartitionState",
        batch: LineBatch,
        line_issues: LineIssues,
        corrections: Corrections,
        writer: PartWriter,
    ) -> None:
        """Write the valid lines of a batch byte for byte. Record the other lines as dead letters, or write their valid
        corrections instead.
        """
        lines, dated = batch.lines, batch.dated
        state.rows += len(lines)
        name, key = state.raw.resource_type, state.raw.partition_key
        invalid = set()
        times = list(islice(batch.times(), len(lines))) if line_issues else []
        for index, issues in line_issues:
            result = ValidationResult(lines[index], issues)
            if not result.valid:
                invalid.add(index)
                dead_letter = replace(
                    build_dead_letter(name, key, lines[index], result, ruleset=self._validator.ruleset),
                    arrived=times[index],
                    dated=dated,
                )
                corrected = corrections.find(dead_letter)
                if corrected is not None and self._validator.check(corrected).valid:
                    writer.add(name, key, corrected, None, arrived=times[index], dated=dated)
                else:
                    state.dead[dead_letter.rule] += 1
                    self._dead_letters.add(dead_letter)
            state.warnings.update(issue.rule for issue in issues if issue.severity == "warning")
        for index, (line, arrived) in enumerate(zip(lines, batch.times(), strict=False)):
            if index not in invalid:
                writer.add(name, key, line, None, arrived=arrived, dated=dated)

    def _build_manifest(self, state: "_PartitionState", parts: tuple[Part, ...]) -> Manifest:
        raw, base = state.raw, state.base
        replays: list[str] = []
        if base and base.validated:
            state.add_counts(base.validated)
            replays = [REPLAY + run for run in base.validated.replays]
        return Manifest(
            "validated",
            raw.resource_type,
            raw.partition_key,
            self._run_id,
            self._now,
            (base.parts if base else ()) + parts,
            validated=Validated(
                (*(part.name for part in raw.parts), *replays),
                self._validator.rules_version,
                state.rows,
                dict(state.dead),
                dict(state.warnings),
                base.validated.complete_run if base and base.validated else self._run_id,
            ),
        )


class _PartitionState:
    """A raw partition during its validation.

    ``existing`` is the manifest of the validated partition in the store. ``base`` is ``existing`` if that partition is
    extended, or None if all parts are validated again. ``pending`` are the raw parts to validate. The counts begin at
    zero; ``_build_manifest`` adds those of ``base``.
    """

    def __init__(
        self, raw: Manifest, existing: Manifest | None, base: Manifest | None, pending: Sequence[Part]
    ) -> None:
        self.raw = raw
        self.existing = existing
        self.base = base
        self.pending = pending
        self.rows = 0
        self.dead: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()

    @property
    def counts(self) -> ValidatedCounts:
        """The counts so far, without those of the base."""
        dead = self.dead.total()
        return ValidatedCounts(self.rows - dead, dead)

    def add_counts(self, earlier: Validated) -> None:
        self.rows += earlier.rows_in
        self.dead.update(earlier.dead)
        self.warnings.update(earlier.warnings)


def build_dead_letter(
    resource_type: str, partition_key: str, line: bytes, result: ValidationResult, *, ruleset: str
) -> DeadLetter:
    """Build the dead letter of an invalid resource: with the rule of its first error, and with all of its issues."""
    first = next(issue for issue in result.issues if issue.severity == "error")
    return DeadLetter(
        resource_type=resource_type,
        resource_id=_read_id(line),
        stage="validate",
        rule=first.rule,
        path=first.path,
        message=first.message,
        resource=line,
        partition_key=partition_key,
        issues=[_to_json(issue) for issue in result.issues],
        ruleset=ruleset,
    )


def _read_id(line: bytes) -> str | None:
    """Return the id of a resource, or None if it cannot be read."""
    try:
        return read_header(line).id
    except MalformedResource:
        return None


def _to_json(issue: Issue) -> dict[str, str]:
    return {"rule": issue.rule, "severity": issue.severity, "path": issue.path, "message": issue.message}
