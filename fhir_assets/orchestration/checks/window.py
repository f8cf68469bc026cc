"""Checks of a window, evaluated by the step that loads it: the numbers are fresh then, and each window has its own
evaluation whether the run has one partition or a range.

What only makes sense of a whole table is in ``checks/table.py``: it would be asked anew for every window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import uuid4

import dagster as dg

from fhir_assets.catalog import ResourceType
from fhir_assets.orchestration.checks.metadata import rows_table
from fhir_assets.orchestration.dagster_internals import DagsterEventBatchMetadata
from fhir_assets.pipeline.reconcile.window_counts import WindowCounts
from fhir_assets.settings import Settings
from fhir_assets.warehouse.postgres.db.connections import Connection
from fhir_assets.warehouse.postgres.queries import quality
from fhir_assets.warehouse.postgres.queries.quality import RuleCount

RECONCILES = "reconciles"
DEAD_LETTER_RATE = "dead_letter_rate"

SAMPLE = 20
"""How many windows a check's table shows at most; it says how many there are."""

_COLUMNS = (
    *("server_total", "matched", "received", "rejected", "raw", "valid", "dead", "withheld", "not_loaded"),
    *("deleted", "loaded", "missing"),
)


def window_check_specs(
    resource_type: ResourceType, partitions: dg.PartitionsDefinition[str]
) -> list[dg.AssetCheckSpec]:
    """The checks that the load of a type evaluates, on its main table."""
    described = {
        RECONCILES: "Every resource of the window stands in the tables, in the dead letters or is withheld: server "
        "count + received = raw; raw = valid + dead + withheld; valid = loaded.",
        DEAD_LETTER_RATE: "The share of the window's resources that are unsettled dead letters, with the rules and "
        "paths that lead. DEAD_LETTER_WARN_RATE and DEAD_LETTER_ERROR_RATE say how many are too many.",
    }
    asset = dg.AssetKey(["normalized", resource_type.key])
    return [
        dg.AssetCheckSpec(name, asset=asset, description=text, partitions_def=partitions)
        for name, text in described.items()
    ]


@dataclass(frozen=True, slots=True)
class WindowChecks:
    """Judges the windows of a run from their balances."""

    resource_type: ResourceType
    settings: Settings
    now: datetime

    def evaluate(
        self,
        context: dg.AssetExecutionContext,
        conn: Connection,
        balances: Sequence[WindowCounts],
        names: Sequence[str],
    ) -> Iterator[dg.AssetCheckResult]:
        """The results of the named checks for the run; in a range run each window's evaluation is logged as well."""
        is_range = context.has_partition_key_range and len(context.partition_keys) > 1
        for name in names:
            each, whole = self._judge(conn, balances, name)
            if is_range:
                # Windows without anything too: one that goes without makes the whole check "skipped" in the UI.
                log_evaluations(
                    context,
                    [
                        found.evaluation(self._asset, name, balance.partition_key)
                        for balance, found in zip(balances, each, strict=True)
                    ],
                )
                yield whole.result(self._asset, name)
            else:
                yield (each[0] if len(each) == 1 else whole).result(self._asset, name)

    def log_other_windows(
        self, context: dg.AssetExecutionContext, conn: Connection, balances: Sequence[WindowCounts], name: str
    ) -> None:
        """Log what a check now says of windows that are not the run's, but that the run changed."""
        each = zip(balances, self._judge(conn, balances, name)[0], strict=True)
        log_evaluations(context, [found.evaluation(self._asset, name, b.partition_key) for b, found in each])

    def _judge(self, conn: Connection, balances: Sequence[WindowCounts], name: str) -> tuple[list["_Found"], "_Found"]:
        """What a check says of each window, and of all together."""
        if name == RECONCILES:
            return [_reconciliation([balance]) for balance in balances], _reconciliation(balances)
        keys = [balance.partition_key for balance in balances]
        leading = quality.count_unresolved_dead_letters(conn, self.resource_type.name, keys)
        return [self._rate([balance], leading) for balance in balances], self._rate(balances, leading)

    @property
    def _asset(self) -> dg.AssetKey:
        return dg.AssetKey(["normalized", self.resource_type.key])

    def _rate(self, balances: Sequence[WindowCounts], leading: dict[str, list[RuleCount]]) -> "_Found":
        total = sum(balance.validated + balance.rejected for balance in balances)
        letters = _summed([rule for balance in balances for rule in leading.get(balance.partition_key, [])])
        dead = sum(rule.letters for rule in letters)
        rate = dead / total if total else float(bool(dead))
        settings = self.settings
        passed = not dead or rate < min(settings.dead_letter_warn_rate, settings.dead_letter_error_rate)
        scope = f"--type {self.resource_type.name}"
        if len(balances) == 1:
            scope += f" --window {balances[0].partition_key}"
        said = f"{dead} of {total} resources ({rate:.2%}) are dead letters"
        if not passed:
            said += (
                f", most of them {_named(letters[0])}. See them: `fhir-assets dead-letters list {scope}`. "
                "Mend the cause at the source and load again, or correct them by `fhir-assets dead-letters edit ID`; "
                f"then: `fhir-assets dead-letters replay {scope}`"
            )
        windows = sorted(
            ((sum(r.letters for r in leading[b.partition_key]), b) for b in balances if b.partition_key in leading),
            key=lambda item: -item[0],
        )
        return _Found(
            passed,
            said,
            {
                "resources": total,
                "dead_letters": dead,
                "rate": round(rate, 6),
                "by_rule": rows_table(
                    ("stage", "rule", "path", "letters:int", "share", "see_them"),
                    [
                        (r.stage, r.rule, r.path, r.letters, f"{r.letters / dead:.1%}", _list_command(r, scope))
                        for r in letters[: quality.MAX_RULES]
                    ],
                ),
                **(
                    {
                        "by_window": rows_table(
                            ("window", "letters:int", "resources:int"),
                            [(b.partition_key, count, b.validated + b.rejected) for count, b in windows[:SAMPLE]],
                        )
                    }
                    if len(balances) > 1
                    else {}
                ),
            },
            warns=rate < settings.dead_letter_error_rate,
        )


def log_evaluations(context: dg.AssetExecutionContext, evaluations: Sequence[dg.AssetCheckEvaluation]) -> None:
    """As ``context.log_event`` of each, written to Dagster's storage together."""
    batch = uuid4().hex
    for number, evaluation in enumerate(evaluations, 1):
        dg.DagsterEvent.from_step(
            dg.DagsterEventType.ASSET_CHECK_EVALUATION,
            context.op_execution_context.get_step_execution_context(),
            evaluation,
            f"{evaluation.check_name} of {evaluation.partition}: {evaluation.description}",
            DagsterEventBatchMetadata(batch, number == len(evaluations)),
        )


@dataclass(frozen=True, slots=True)
class _Found:
    passed: bool
    description: str
    metadata: dict[str, dg.MetadataValue | int | float]
    warns: bool = False

    def result(self, asset: dg.AssetKey, name: str) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            passed=self.passed,
            asset_key=asset,
            check_name=name,
            description=self.description,
            metadata=self.metadata,
            severity=self._severity,
        )

    def evaluation(self, asset: dg.AssetKey, name: str, partition_key: str) -> dg.AssetCheckEvaluation:
        normalized = dg.AssetCheckResult(passed=self.passed, metadata=self.metadata)
        return dg.AssetCheckEvaluation(
            asset_key=asset,
            check_name=name,
            passed=self.passed,
            description=self.description,
            metadata=normalized.metadata,
            severity=self._severity,
            partition=partition_key,
        )

    @property
    def _severity(self) -> dg.AssetCheckSeverity:
        return dg.AssetCheckSeverity.WARN if self.warns else dg.AssetCheckSeverity.ERROR


def _reconciliation(balances: Sequence[WindowCounts]) -> _Found:
    faulty = [balance for balance in balances if balance.faults]
    shown = faulty or balances
    said = f"{len(faulty)} of {len(balances)} windows do not reconcile" if faulty else "every resource is accounted for"
    faults = "; ".join(fault for balance in faulty[:3] for fault in balance.faults)
    return _Found(
        not faulty,
        f"{said}: {faults}" if faults else said,
        {
            "windows": len(balances),
            "unreconciled_windows": len(faulty),
            **{name: sum(getattr(balance, name) or 0 for balance in balances) for name in _COLUMNS},
            "by_window": rows_table(
                ("window", *(f"{name}:int" for name in _COLUMNS), "what_to_do"),
                [
                    (b.partition_key, *(_shown(getattr(b, name)) for name in _COLUMNS), "; ".join(b.faults))
                    for b in shown[:SAMPLE]
                ],
            ),
        },
    )


def _summed(rules: Sequence[RuleCount]) -> list[RuleCount]:
    letters: dict[tuple[str, str, str], int] = {}
    for rule in rules:
        key = (rule.stage, rule.rule, rule.path)
        letters[key] = letters.get(key, 0) + rule.letters
    return sorted((RuleCount(*key, count) for key, count in letters.items()), key=lambda rule: -rule.letters)


def _named(rule: RuleCount) -> str:
    return f"{rule.rule} at {rule.path}" if rule.path else rule.rule


def _list_command(rule: RuleCount, scope: str) -> str:
    if not rule.stage:
        return f"fhir-assets dead-letters list {scope}"
    return f"fhir-assets dead-letters list {scope} --rule {rule.rule}"


def _shown(value: int | None) -> int | str:
    return "not said" if value is None else value
