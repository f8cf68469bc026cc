"""Lines about a step in the log view of its run: what it requested, what it received, and what it skipped.

They are engine events. Dagster's loggers are not used, because they also write to stderr, with stack traces;
``dagster.yaml`` disables them. A step that had nothing to do writes no line. Lines contain counts, types and rules,
never patient data.
"""

from collections.abc import Mapping

import dagster as dg

from fhir_assets.control_characters import escape_control_characters

_MAX_RULES = 5


def log_line(context: dg.AssetExecutionContext, text: str) -> None:
    """Add a line to the log view of the run."""
    step = context.op_execution_context.get_step_execution_context().step
    context.instance.report_engine_event(escape_control_characters(text), context.run, step_key=step.key)


def describe_counts(resource_type: str, counts: Mapping[str, int], seconds: float) -> str:
    """Return ``Patient: 10 fetched, 2 rejected, 0.3 s``, without counts of zero."""
    shown = [f"{count:,} {name}" for name, count in counts.items() if count]
    return f"{resource_type}: {', '.join([*shown, f'{seconds:.1f} s'])}"


def describe_rules(dead_by_rule: Mapping[str, int]) -> str:
    """Return ``2 required-binding, 1 type``, the most frequent rules first; an empty text if there are none."""
    rules = sorted(dead_by_rule.items(), key=lambda item: -item[1])
    more = f" and {len(rules) - _MAX_RULES} more rules" if len(rules) > _MAX_RULES else ""
    return ", ".join(f"{count:,} {rule}" for rule, count in rules[:_MAX_RULES]) + more
