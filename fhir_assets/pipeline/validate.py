"""raw -> validated: every resource is either kept, as its received bytes, or becomes a dead letter."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from fhir_assets.fhir.record import Malformed, read_header
from fhir_assets.fhir.validation import Issue, Validator, Verdict
from fhir_assets.pipeline.collector import seldom_collected
from fhir_assets.pipeline.letters import LetterBuffer, Reject
from fhir_assets.pipeline.plan import Refresh
from fhir_assets.store.manifest import Manifest, Part, Validated
from fhir_assets.store.store import Store
from fhir_assets.store.writer import PartWriter
from fhir_assets.warehouse.dead_letters import DeadLetter


@dataclass(frozen=True, slots=True)
class ValidatedUpdate:
    """The new partitions of one type, not yet visible. ``judged`` are the keys whose whole partition was judged,
    so that its earlier dead letters that did not fail again are settled.
    """

    resource_type: str
    manifests: tuple[Manifest, ...]
    judged: tuple[str, ...]
    bases: Mapping[str, Manifest | None]
    """By partition key, the validated partition that was there before: see pipeline.commit."""


class ResourceValidation:
    """Judges raw partitions of one type after the other."""

    def __init__(
        self, store: Store, validator: Validator, *, run_id: str, now: datetime, refresh: Refresh, reject: Reject
    ) -> None:
        self._store = store
        self._validator = validator
        self._run_id = run_id
        self._now = now
        self._refresh = refresh
        self._letters = LetterBuffer(reject)

    @seldom_collected()
    def validate(self, resource_type: str, raw: Sequence[Manifest]) -> ValidatedUpdate:
        """Judge what of the raw partitions is not judged yet, or all of it; the caller commits the manifests.

        Raises StoreError; the partitions are then as before.
        """
        states: list[tuple[Manifest, Manifest | None, _Tally]] = []
        bases: dict[str, Manifest | None] = {}
        with PartWriter(self._store, "validated") as writer:
            for manifest in raw:
                existing = self._store.manifest("validated", resource_type, manifest.partition_key)
                base = self._extended(manifest, existing)
                done = base.validated.inputs if base and base.validated else ()
                todo = [part for part in manifest.parts if part.name not in done]
                if base is existing and base is not None and not todo:
                    continue
                bases[manifest.partition_key] = existing
                states.append((manifest, base, self._judge(manifest, todo, writer)))
            self._letters.flush()
            parts = writer.finish()
        return ValidatedUpdate(
            resource_type,
            tuple(
                self._manifest(manifest, base, tally, parts.get((resource_type, manifest.partition_key), ()))
                for manifest, base, tally in states
            ),
            tuple(manifest.partition_key for manifest, base, _ in states if base is None),
            bases,
        )

    def _extended(self, raw: Manifest, existing: Manifest | None) -> Manifest | None:
        """The validated partition that only lacks new raw parts; None where all has to be judged."""
        if existing is None or existing.validated is None or self._refresh is not Refresh.MISSING:
            return None
        if existing.validated.rules_version != self._validator.rules_version:
            return None
        names = {part.name for part in raw.parts}
        return existing if names.issuperset(existing.validated.inputs) else None

    def _judge(self, raw: Manifest, todo: Sequence[Part], writer: PartWriter) -> "_Tally":
        tally = _Tally()
        check = self._validator.check
        name, key = raw.resource_type, raw.partition_key
        for batch in self._store.batches(todo):
            tally.rows += len(batch)
            for line in batch:
                verdict = check(line)
                if verdict.valid:
                    writer.add(name, key, line, None)
                else:
                    letter = dead_letter(name, key, line, verdict)
                    tally.dead[letter.rule] += 1
                    self._letters.add(letter)
                for issue in verdict.issues:
                    if issue.severity == "warning":
                        tally.warnings[issue.rule] += 1
        return tally

    def _manifest(self, raw: Manifest, base: Manifest | None, tally: "_Tally", parts: tuple[Part, ...]) -> Manifest:
        if base and base.validated:
            before = base.validated
            tally.add(before)
        return Manifest(
            "validated",
            raw.resource_type,
            raw.partition_key,
            self._run_id,
            self._now,
            (base.parts if base else ()) + parts,
            validated=Validated(
                tuple(part.name for part in raw.parts),
                self._validator.rules_version,
                tally.rows,
                dict(tally.dead),
                dict(tally.warnings),
            ),
        )


class _Tally:
    """What judging a partition came to."""

    def __init__(self) -> None:
        self.rows = 0
        self.dead: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()

    def add(self, earlier: Validated) -> None:
        self.rows += earlier.rows_in
        self.dead.update(earlier.dead)
        self.warnings.update(earlier.warnings)


def dead_letter(resource_type: str, partition_key: str, line: bytes, verdict: Verdict) -> DeadLetter:
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
    )


def _readable_id(line: bytes) -> str | None:
    try:
        return read_header(line).id
    except Malformed:
        return None


def _as_json(issue: Issue) -> dict[str, str]:
    return {"rule": issue.rule, "severity": issue.severity, "path": issue.path, "message": issue.message}
