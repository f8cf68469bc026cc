"""Checks of one window, evaluated by the step that loads it.

Each window has its own evaluation, whether the run loads one partition or a range. Checks of a table over all windows
are in ``checks/table.py``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import uuid4

import dagster as dg

from fhir_assets.catalog import BY_NAME, ResourceType
from fhir_assets.orchestration.check_names import DEAD_LETTER_RATE, RECONCILES
from fhir_assets.orchestration.checks.metadata import rows_table
from fhir_assets.orchestration.dagster_internals import (
    AssetCheckEvaluationTargetMaterializationData,
    DagsterEventBatchMetadata,
)
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts
from fhir_assets.settings import Settings
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.queries import quality
from fhir_assets.warehouse.postgres.queries.quality import RuleCount

Targets = Mapping[str, AssetCheckEvaluationTargetMaterializationData]
"""Materializations by partition key."""


MAX_SHOWN_WINDOWS = 20
"""The maximum number of windows that the metadata of a check lists; the check's counts cover all windows."""

_COLUMNS = (
    *("server_total", "matched", "undated", "received", "rejected", "raw", "valid", "dead", "withheld", "not_loaded"),
    *("deleted", "superseded", "loaded", "missing"),
)


def window_check_specs(
    resource_type: ResourceType, partitions: dg.PartitionsDefinition[str]
) -> list[dg.AssetCheckSpec]:
    """Return the specs of the checks that a load of ``resource_type`` evaluates on its main table."""
    descriptions = {
        RECONCILES: "Every resource of the window is in the tables, is a dead letter or is withheld: "
        "server count + undated + received = raw; raw = valid + dead + withheld; valid = loaded + superseded by a "
        "newer version.",
        DEAD_LETTER_RATE: "The share of the window's resources that are unresolved dead letters, with the most "
        "frequent rules and paths. DEAD_LETTER_WARN_RATE and DEAD_LETTER_ERROR_RATE set the limits.",
    }
    asset = dg.AssetKey(["normalized", resource_type.key])
    return [
        dg.AssetCheckSpec(name, asset=asset, description=description, partitions_def=partitions)
        for name, description in descriptions.items()
    ]


@dataclass(frozen=True, slots=True)
class WindowChecks:
    """Evaluates the checks of windows from their counts."""

    resource_type: ResourceType
    settings: Settings

    def evaluate(
        self,
        context: dg.AssetExecutionContext,
        conn: Connection,
        counts: Sequence[WindowCounts],
        names: Sequence[str],
    ) -> Iterator[dg.AssetCheckResult]:
        """Yield the results of the named checks for the run.

        Unless the run is of a single partition, log the evaluation of each window too.
        """
        if context.has_partition_key:
            for name in names:
                yield self._evaluate(conn, counts, name)[1].to_result(self._asset, name)
            return
        targets = find_targets(context.instance, self._asset, [window.partition_key for window in counts])
        for name in names:
            by_window, total = self._evaluate(conn, counts, name)
            # Empty windows are included, because the UI shows a check as skipped if one window has no evaluation.
            self._log(context, counts, by_window, name, targets)
            yield total.to_result(self._asset, name)

    def log_other_windows(
        self, context: dg.AssetExecutionContext, conn: Connection, counts: Sequence[WindowCounts], name: str
    ) -> None:
        """Log new evaluations of windows outside the run whose dead letters the run resolved."""
        targets = find_targets(context.instance, self._asset, [window.partition_key for window in counts])
        self._log(context, counts, self._evaluate(conn, counts, name)[0], name, targets)

    def evaluate_outside_run(
        self, instance: dg.DagsterInstance, conn: Connection, counts: Sequence[WindowCounts], name: str
    ) -> list[dg.AssetCheckEvaluation]:
        """Return the evaluation of the named check of each window, outside of a run."""
        targets = find_targets(instance, self._asset, [window.partition_key for window in counts])
        return [
            result.to_evaluation(self._asset, name, window.partition_key, targets.get(window.partition_key))
            for window, result in zip(counts, self._evaluate(conn, counts, name)[0], strict=True)
        ]

    def _log(
        self,
        context: dg.AssetExecutionContext,
        counts: Sequence[WindowCounts],
        results: Sequence["_Evaluation"],
        name: str,
        targets: Targets,
    ) -> None:
        evaluations = [
            result.to_evaluation(self._asset, name, window.partition_key, targets.get(window.partition_key))
            for window, result in zip(counts, results, strict=True)
        ]
        log_evaluations(context, evaluations)

    def _evaluate(
        self, conn: Connection, counts: Sequence[WindowCounts], name: str
    ) -> tuple[list["_Evaluation"], "_Evaluation"]:
        """Return the evaluation of each window, and the evaluation of all windows together."""
        if name == RECONCILES:
            return [_evaluate_reconciliation([window]) for window in counts], _evaluate_reconciliation(counts)
        keys = [window.partition_key for window in counts]
        rule_counts = quality.count_unresolved_dead_letters(conn, self.resource_type.name, keys)
        return [self._evaluate_rate([window], rule_counts) for window in counts], self._evaluate_rate(
            counts, rule_counts
        )

    @property
    def _asset(self) -> dg.AssetKey:
        return dg.AssetKey(["normalized", self.resource_type.key])

    def _evaluate_rate(self, counts: Sequence[WindowCounts], rule_counts: dict[str, list[RuleCount]]) -> "_Evaluation":
        total = sum(window.validated + window.rejected for window in counts)
        rules = _sum_rules([rule for window in counts for rule in rule_counts.get(window.partition_key, [])])
        dead = sum(rule.dead_letters for rule in rules)
        rate = dead / total if total else float(bool(dead))
        settings = self.settings
        passed = not dead or rate < min(settings.dead_letter_warn_rate, settings.dead_letter_error_rate)
        scope = f"--type {self.resource_type.name}"
        if len(counts) == 1:
            scope += f" --window {counts[0].partition_key}"
        description = f"{dead} of {total} resources ({rate:.2%}) are dead letters"
        if not passed:
            description += (
                f", most of them {_describe_rule(rules[0])}. List them: `fhir-assets dead-letters list {scope}`. "
                "Correct the cause at the source and load again, or correct them by `fhir-assets dead-letters edit "
                f"ID`, then `fhir-assets dead-letters replay {scope}`"
            )
        metadata: dict[str, dg.MetadataValue | int | float] = {
            "resources": total,
            "dead_letters": dead,
            "rate": round(rate, 6),
        }
        if rules:
            metadata["by_rule"] = rows_table(
                ("stage", "rule", "path", "dead_letters:int", "share", "command"),
                [
                    (r.stage, r.rule, r.path, r.dead_letters, f"{r.dead_letters / dead:.1%}", _list_command(r, scope))
                    for r in rules[: quality.MAX_RULES]
                ],
            )
        if len(counts) > 1:
            metadata["by_window"] = _rate_by_window(counts, rule_counts)
        return _Evaluation(passed, description, metadata, warns=rate < settings.dead_letter_error_rate)


def evaluate_reconciliation(
    instance: dg.DagsterInstance, resource_type: str, counts: WindowCounts
) -> dg.AssetCheckEvaluation:
    """Return the evaluation of the check ``reconciles`` of one window, outside of a run."""
    asset = dg.AssetKey(["normalized", BY_NAME[resource_type].key])
    key = counts.partition_key
    return _evaluate_reconciliation([counts]).to_evaluation(
        asset, RECONCILES, key, find_targets(instance, asset, [key]).get(key)
    )


def find_targets(instance: dg.DagsterInstance, asset: dg.AssetKey, partition_keys: Sequence[str]) -> Targets:
    """Return the latest materialization of each partition that was ever materialized.

    The UI shows an evaluation as outdated if it does not name the latest materialization of its partition.
    """
    latest = instance.get_latest_storage_id_by_partition(
        asset, dg.DagsterEventType.ASSET_MATERIALIZATION, set(partition_keys)
    )
    if not latest:
        return {}
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=asset, storage_ids=list(latest.values())), limit=len(latest)
    ).records
    return {
        record.partition_key: AssetCheckEvaluationTargetMaterializationData(
            storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
        )
        for record in records
        if record.partition_key is not None
    }


def log_evaluations(context: dg.AssetExecutionContext, evaluations: Sequence[dg.AssetCheckEvaluation]) -> None:
    """Log the evaluations as ``context.log_event`` would, but in one batch if Dagster's storage supports that."""
    batch = uuid4().hex
    batched = getattr(context.instance.event_log_storage, "batches_evaluations", False)
    for number, evaluation in enumerate(evaluations, 1):
        scope = f" of {evaluation.partition}" if evaluation.partition else ""
        dg.DagsterEvent.from_step(
            dg.DagsterEventType.ASSET_CHECK_EVALUATION,
            context.op_execution_context.get_step_execution_context(),
            evaluation,
            f"{evaluation.check_name}{scope}: {evaluation.description}",
            DagsterEventBatchMetadata(batch, number == len(evaluations)) if batched else None,
        )


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """The outcome of a check; ``warns`` lowers the severity of a failed check to WARN."""

    passed: bool
    description: str
    metadata: dict[str, dg.MetadataValue | int | float]
    warns: bool = False

    def to_result(self, asset: dg.AssetKey, name: str) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            passed=self.passed,
            asset_key=asset,
            check_name=name,
            description=self.description,
            metadata=self.metadata,
            severity=self._severity,
        )

    def to_evaluation(
        self,
        asset: dg.AssetKey,
        name: str,
        partition_key: str,
        target: AssetCheckEvaluationTargetMaterializationData | None,
    ) -> dg.AssetCheckEvaluation:
        normalized = dg.AssetCheckResult(passed=self.passed, metadata=self.metadata)
        return dg.AssetCheckEvaluation(
            asset_key=asset,
            check_name=name,
            passed=self.passed,
            description=self.description,
            metadata=normalized.metadata,
            severity=self._severity,
            partition=partition_key,
            target_materialization_data=target,
        )

    @property
    def _severity(self) -> dg.AssetCheckSeverity:
        return dg.AssetCheckSeverity.WARN if self.warns else dg.AssetCheckSeverity.ERROR


def _evaluate_reconciliation(counts: Sequence[WindowCounts]) -> _Evaluation:
    unreconciled = [window for window in counts if window.faults]
    description = (
        f"{len(unreconciled)} of {len(counts)} windows do not reconcile"
        if unreconciled
        else "every resource is accounted for"
    )
    faults = "; ".join(fault for window in unreconciled[:3] for fault in window.faults)
    warnings = dict.fromkeys(warning for window in counts for warning in window.warnings)
    metadata: dict[str, dg.MetadataValue | int | float] = {
        "windows": len(counts),
        **({"warnings": dg.MetadataValue.text("; ".join(warnings))} if warnings else {}),
        "unreconciled_windows": len(unreconciled),
        **{name: sum(getattr(window, name) or 0 for window in counts) for name in _COLUMNS},
    }
    if unreconciled or len(counts) > 1:
        metadata["by_window"] = rows_table(
            ("window", *(f"{name}:int" for name in _COLUMNS), "faults"),
            [
                (
                    window.partition_key,
                    *(_show_count(getattr(window, name)) for name in _COLUMNS),
                    "; ".join(window.faults),
                )
                for window in (unreconciled or counts)[:MAX_SHOWN_WINDOWS]
            ],
        )
    return _Evaluation(not unreconciled, f"{description}: {faults}" if faults else description, metadata)


def _rate_by_window(counts: Sequence[WindowCounts], rule_counts: dict[str, list[RuleCount]]) -> dg.MetadataValue:
    """Return a table of the windows with dead letters, sorted by their number, largest first."""
    windows = sorted(
        (
            (sum(rule.dead_letters for rule in rule_counts[window.partition_key]), window)
            for window in counts
            if window.partition_key in rule_counts
        ),
        key=lambda item: -item[0],
    )
    return rows_table(
        ("window", "dead_letters:int", "resources:int"),
        [
            (window.partition_key, dead, window.validated + window.rejected)
            for dead, window in windows[:MAX_SHOWN_WINDOWS]
        ],
    )


def _sum_rules(rules: Sequence[RuleCount]) -> list[RuleCount]:
    """Return the rules of all windows with their dead letters summed, the most frequent rule first."""
    totals: dict[tuple[str, str, str], int] = {}
    for rule in rules:
        key = (rule.stage, rule.rule, rule.path)
        totals[key] = totals.get(key, 0) + rule.dead_letters
    return sorted((RuleCount(*key, count) for key, count in totals.items()), key=lambda rule: -rule.dead_letters)


def _describe_rule(rule: RuleCount) -> str:
    return f"{rule.rule} at {rule.path}" if rule.path else rule.rule


def _list_command(rule: RuleCount, scope: str) -> str:
    if not rule.stage:
        return f"fhir-assets dead-letters list {scope}"
    return f"fhir-assets dead-letters list {scope} --rule {rule.rule}"


def _show_count(value: int | None) -> int | str:
    return "unknown" if value is None else value
