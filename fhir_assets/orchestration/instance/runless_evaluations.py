"""Evaluations of checks outside of a run: one row for each check and partition in Dagster's database."""

from datetime import datetime

import dagster as dg
from sqlalchemy.dialects import postgresql

from fhir_assets.orchestration.dagster_internals import AssetCheckExecutionRecordStatus, load_event_log_tables
from fhir_assets.orchestration.instance.event_rows import key_text

_EXECUTIONS = load_event_log_tables().check_executions
_KEY = ("asset_key", "check_name", "run_id", "partition")


def build_runless_evaluation(event: dg.EventLogEntry, event_id: int | None, timestamp: datetime) -> postgresql.Insert:
    """Return the statement that stores an evaluation and replaces the previous one.

    Its run id is empty. The replaced row gets a new id, because ids order the evaluations of a check.
    """
    evaluation = event.get_dagster_event().event_specific_data
    assert isinstance(evaluation, dg.AssetCheckEvaluation)
    status = AssetCheckExecutionRecordStatus
    target = evaluation.target_materialization_data
    statement = postgresql.insert(_EXECUTIONS).values(
        asset_key=key_text(evaluation.asset_key),
        check_name=evaluation.check_name,
        run_id=event.run_id,
        partition=evaluation.partition,
        execution_status=(status.SUCCEEDED if evaluation.passed else status.FAILED).value,
        evaluation_event=dg.serialize_value(event),
        evaluation_event_timestamp=timestamp,
        evaluation_event_storage_id=event_id,
        materialization_event_storage_id=target.storage_id if target else None,
    )
    changed = {column.name: statement.excluded[column.name] for column in _EXECUTIONS.c if column.name not in _KEY}
    return statement.on_conflict_do_update(index_elements=_KEY, set_=changed)
