"""raw -> validated: every resource is either kept, as its received bytes, or becomes a dead letter."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from fhir_assets.fhir.record import MalformedResource, read_header
from fhir_assets.fhir.validation import Issue, Validator, Verdict
from fhir_assets.pipeline.dead_letter_buffer import DeadLetterBuffer
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.pipeline.workers.pool import WorkerPool
from fhir_assets.storage.manifest import REPLAY, Manifest, Part, Validated
from fhir_assets.storage.part_writer import PartWriter
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import dead_letters
from fhir_assets.warehouse.ops.corrections import Corrections
from fhir_assets.warehouse.ops.dead_letters import DeadLetter
from fhir_assets.warehouse.postgres.db.connections import OpenSession


@dataclass(frozen=True, slots=True)
class ValidatedUpdate:
    """The new partitions of one type, not yet visible. ``judged`` are the keys whose whole partition was judged,
    so that its earlier dead letters that did not fail again are settled.
    """

    resource_type: str
    manifests: tuple[Manifest, ...]
    revalidated_keys: tuple[str, ...]
    bases: Mapping[str, Manifest | None]
    """By partition key, the validated partition that was there before: see pipeline.partition_commit."""


_BYTES_PER_SECOND = 50e6

Found = list[tuple[int, tuple[Issue, ...]]]
"""The lines of a batch that have issues, each with its place in it."""


@dataclass(frozen=True)
class LineValidator:
    """The job of a worker: a batch of lines in, what is wrong with them out."""

    validator: Validator

    def __call__(self, lines: list[bytes]) -> Found:
        check = self.validator.check
        return [(place, verdict.issues) for place, line in enumerate(lines) if (verdict := check(line)).issues]


class ValidateStep:
    """Judges raw partitions of one type after the other."""

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
        self._letters = DeadLetterBuffer(lambda letters: dead_letters.record_now(connect, run_id, letters))

    @infrequent_gc()
    def run(self, resource_type: str, raw: Sequence[Manifest]) -> ValidatedUpdate:
        """Judge what of the raw partitions is not judged yet, or all of it; the caller commits the manifests.

        Raises StoreError; the partitions are then as before.
        """
        states = list(self._states(resource_type, raw))
        corrections = Corrections(
            self._connect, resource_type, ["validate"], [state.raw.partition_key for state in states]
        )
        judged = self._workers.map(
            LineValidator(self._validator),
            ((state, lines) for state in states for lines in self._store.batches(state.todo)),
            weigh=lambda lines: sum(map(len, lines)),
            seconds=sum(part.bytes for state in states for part in state.todo) / _BYTES_PER_SECOND,
        )
        with PartWriter(self._store, "validated") as writer:
            for state, lines, found in judged:
                self._sort(state, lines, found, corrections, writer)
            self._letters.flush()
            parts = writer.finish()
        return ValidatedUpdate(
            resource_type,
            tuple(self._manifest(state, parts.get((resource_type, state.raw.partition_key), ())) for state in states),
            tuple(state.raw.partition_key for state in states if state.base is None),
            {state.raw.partition_key: state.existing for state in states},
        )

    def _states(self, resource_type: str, raw: Sequence[Manifest]) -> Iterator["_State"]:
        """The partitions that have something to judge, or were never written."""
        keys = [manifest.partition_key for manifest in raw]
        there = {each.partition_key: each for each in self._store.manifests("validated", resource_type, keys)}
        for manifest in raw:
            existing = there.get(manifest.partition_key)
            base = self._extended(manifest, existing)
            done = base.validated.inputs if base and base.validated else ()
            todo = [part for part in manifest.parts if part.name not in done]
            if base is None or todo:
                yield _State(manifest, existing, base, todo)

    def _extended(self, raw: Manifest, existing: Manifest | None) -> Manifest | None:
        """The validated partition that only lacks new raw parts; None where all has to be judged."""
        if existing is None or existing.validated is None or self._refresh is not Refresh.MISSING:
            return None
        if existing.validated.rules_version != self._validator.rules_version:
            return None
        names = {part.name for part in raw.parts}
        return existing if names.issuperset(existing.validated.raw_parts) else None

    def _sort(
        self, state: "_State", lines: list[bytes], found: Found, corrections: Corrections, writer: PartWriter
    ) -> None:
        """Keep the valid lines of a batch, byte for byte; make dead letters of the others, unless they were corrected
        by hand before.
        """
        state.rows += len(lines)
        name, key = state.raw.resource_type, state.raw.partition_key
        refused = set()
        for place, issues in found:
            verdict = Verdict(lines[place], issues)
            if not verdict.valid:
                refused.add(place)
                letter = build_dead_letter(name, key, lines[place], verdict, ruleset=self._validator.ruleset)
                corrected = corrections.find(letter)
                if corrected is not None and self._validator.check(corrected).valid:
                    writer.add(name, key, corrected, None)
                else:
                    state.dead[letter.rule] += 1
                    self._letters.add(letter)
            state.warnings.update(issue.rule for issue in issues if issue.severity == "warning")
        for place, line in enumerate(lines):
            if place not in refused:
                writer.add(name, key, line, None)

    def _manifest(self, state: "_State", parts: tuple[Part, ...]) -> Manifest:
        raw, base = state.raw, state.base
        replays: list[str] = []
        if base and base.validated:
            state.add(base.validated)
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
            ),
        )


class _State:
    """A raw partition, the validated one that is there and the one that it extends, the parts to judge, and what
    judging them came to.
    """

    def __init__(self, raw: Manifest, existing: Manifest | None, base: Manifest | None, todo: Sequence[Part]) -> None:
        self.raw = raw
        self.existing = existing
        self.base = base
        self.todo = todo
        self.rows = 0
        self.dead: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()

    def add(self, earlier: Validated) -> None:
        self.rows += earlier.rows_in
        self.dead.update(earlier.dead)
        self.warnings.update(earlier.warnings)


def build_dead_letter(
    resource_type: str, partition_key: str, line: bytes, verdict: Verdict, *, ruleset: str
) -> DeadLetter:
    """The dead letter of a resource that was refused: its first error leads, all issues come with it."""
    first = next(issue for issue in verdict.issues if issue.severity == "error")
    return DeadLetter(
        resource_type=resource_type,
        resource_id=_readable_id(line),
        stage="validate",
        rule=first.rule,
        path=first.path,
        message=first.message,
        resource=line,
        partition_key=partition_key,
        issues=[_as_json(issue) for issue in verdict.issues],
        ruleset=ruleset,
    )


def _readable_id(line: bytes) -> str | None:
    try:
        return read_header(line).id
    except MalformedResource:
        return None


def _as_json(issue: Issue) -> dict[str, str]:
    return {"rule": issue.rule, "severity": issue.severity, "path": issue.path, "message": issue.message}
