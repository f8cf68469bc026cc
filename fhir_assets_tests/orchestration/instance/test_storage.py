"""The events of a step are written in one batch; readers see the rows that dagster-postgres would have written."""

import logging
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy

from fhir_assets.orchestration.instance import storage
from fhir_assets.orchestration.instance.storage import BatchedEventLog
from fhir_assets.warehouse.postgres.db.connections import normalise_url

pytestmark = [
    pytest.mark.filterwarnings("ignore::dagster.BetaWarning"),
    pytest.mark.filterwarnings("ignore::dagster.PreviewWarning"),
]

PLANNED = dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
DONE = dg.DagsterEventType.ASSET_MATERIALIZATION
EVALUATION = dg.DagsterEventType.ASSET_CHECK_EVALUATION
DAYS = dg.StaticPartitionsDefinition(["a", "b"])


def open_instance(database: str, folder: Path) -> dg.DagsterInstance:
    folder.mkdir(exist_ok=True)
    return dg.DagsterInstance.local_temp(
        str(folder),
        overrides={
            "storage": {
                "custom": {
                    "module": "fhir_assets.orchestration.instance.storage",
                    "class": "PooledPostgresStorage",
                    "config": {"postgres_url": normalise_url(database, "psycopg2")},
                }
            }
        },
    )


@pytest.fixture
def instance(database: str, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with open_instance(database, tmp_path) as opened:
        yield opened


@pytest.fixture
def reader(instance: dg.DagsterInstance, database: str, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """Another instance on the same storage, as another process would open it."""
    with open_instance(database, tmp_path / "reader") as opened:
        yield opened


def fail_batches(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let every write of a batch raise ``error``."""

    def build_rows(events: object) -> None:
        raise error

    monkeypatch.setattr(storage, "build_rows", build_rows)


def event_types(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    return [event.dagster_event_type.value for event in instance.all_logs(run_id) if event.dagster_event_type]


def test_events_are_stored_in_the_order_in_which_they_were_logged(
    instance: dg.DagsterInstance, reader: dg.DagsterInstance
) -> None:
    during_step: list[dg.EventLogEntry] = []

    @dg.asset(partitions_def=DAYS, check_specs=[dg.AssetCheckSpec("good", asset="one", partitions_def=DAYS)])
    def one(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        context.log.info("at work")
        during_step.extend(instance.all_logs(context.run.run_id))
        yield dg.MaterializeResult(check_results=[dg.AssetCheckResult(passed=True)], metadata={"rows": 1})

    @dg.asset(partitions_def=DAYS, deps=[one])
    def two() -> None:
        pass

    result = dg.materialize([one, two], instance=instance, partition_key="a")
    events = reader.all_logs(result.run_id)
    assert events[: len(during_step)] == during_step
    assert "at work" in [event.user_message for event in during_step]
    steps = [e.dagster_event_type.value for e in events if e.dagster_event_type and e.step_key == "one"]
    assert steps[steps.index("STEP_START") :] == [
        "STEP_START",
        "STEP_OUTPUT",
        "ASSET_MATERIALIZATION",
        "STEP_OUTPUT",
        "ASSET_CHECK_EVALUATION",
        "STEP_SUCCESS",
    ]
    assert [event.timestamp for event in events] == sorted(event.timestamp for event in events)
    for key in (one.key, two.key):
        (record,) = reader.get_asset_records([key])
        assert record.asset_entry.last_materialization_record
        assert record.asset_entry.last_run_id == result.run_id
        assert reader.get_materialized_partitions(key) == {"a"}
    (check,) = reader.event_log_storage.get_asset_check_execution_history(dg.AssetCheckKey(one.key, "good"), limit=10)
    assert check.partition == "a"
    assert check.status.value == "SUCCEEDED"
    materialized = reader.get_latest_materialization_event(one.key)
    assert check.event
    evaluation = check.event.get_dagster_event().asset_check_evaluation_data
    assert materialized
    assert evaluation.target_materialization_data
    assert evaluation.target_materialization_data.run_id == result.run_id


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_range_has_the_same_planned_events_as_in_dagsters_own_storage(
    instance: dg.DagsterInstance, reader: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, one_by_one: bool
) -> None:
    @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
    def one() -> None:
        pass

    @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run(), deps=[one])
    def two() -> None:
        pass

    def run_and_read(writer: dg.DagsterInstance, reader: dg.DagsterInstance) -> list[tuple[object, ...]]:
        tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "b"}
        result = dg.materialize([one, two], instance=writer, tags=tags)
        planned = reader.all_logs(result.run_id, of_type=PLANNED)
        return [(e.dagster_event, e.level, e.user_message, e.step_key, e.job_name) for e in planned]

    if one_by_one:
        fail_batches(monkeypatch, ValueError())
    with dg.instance_for_test() as plain:
        assert run_and_read(instance, reader) == run_and_read(plain, plain)
    for key in ("a", "b"):
        for asset in (one.key, two.key):
            assert reader.event_log_storage.get_latest_planned_materialization_info(asset, key)


def test_the_page_of_a_run_shows_once_what_repeats_for_each_window_and_every_failed_check(
    instance: dg.DagsterInstance,
) -> None:
    @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run())
    def one(context: dg.AssetExecutionContext) -> None:
        for name in ("good", "bad"):
            for day in ("a", "b"):
                evaluation = dg.AssetCheckEvaluation(
                    asset_key=dg.AssetKey("one"), check_name=name, passed=name == "good", metadata={}, partition=day
                )
                context.instance.report_dagster_event(
                    dg.DagsterEvent(EVALUATION.value, context.job_name, event_specific_data=evaluation),
                    context.run.run_id,
                )

    tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "b"}
    run_id = dg.materialize([one], instance=instance, tags=tags).run_id
    stored = {kind: len(instance.all_logs(run_id, of_type=kind)) for kind in (PLANNED, DONE, EVALUATION)}
    shown = [event.dagster_event for event in instance.all_logs(run_id) if event.dagster_event]
    assert stored == {PLANNED: 2, DONE: 2, EVALUATION: 4}
    assert {kind: sum(event.event_type is kind for event in shown) for kind in (PLANNED, DONE)} == {PLANNED: 1, DONE: 1}
    evaluations = [event.asset_check_evaluation_data for event in shown if event.event_type is EVALUATION]
    assert [(evaluation.check_name, evaluation.partition) for evaluation in evaluations] == [
        ("good", "a"),
        ("bad", "a"),
        ("bad", "b"),
    ]
    assert "STEP_SUCCESS" in event_types(instance, run_id)


def test_readers_see_the_start_of_a_step_at_once_and_all_of_its_events_at_its_end(
    instance: dg.DagsterInstance, reader: dg.DagsterInstance
) -> None:
    seen: list[list[str]] = []

    @dg.asset
    def one(context: dg.AssetExecutionContext) -> None:
        seen.append(event_types(reader, context.run.run_id))

    @dg.asset(deps=[one])
    def two(context: dg.AssetExecutionContext) -> None:
        seen.append(event_types(reader, context.run.run_id))

    assert dg.materialize([one, two], instance=instance).success
    assert seen[0][-1] == "STEP_START"
    assert {"ASSET_MATERIALIZATION", "STEP_SUCCESS"} <= set(seen[1])


def test_a_failed_step_has_all_of_its_events(instance: dg.DagsterInstance, reader: dg.DagsterInstance) -> None:
    @dg.asset
    def one(context: dg.AssetExecutionContext) -> None:
        context.log.info("about to fail")
        raise dg.Failure("on purpose")

    result = dg.materialize([one], instance=instance, raise_on_error=False)
    assert [event for event in reader.all_logs(result.run_id) if event.user_message == "about to fail"]
    assert event_types(reader, result.run_id)[-1] == "PIPELINE_FAILURE"
    assert "STEP_FAILURE" in event_types(reader, result.run_id)


def test_an_event_that_cannot_be_stored_does_not_affect_the_other_events(
    instance: dg.DagsterInstance, reader: dg.DagsterInstance
) -> None:
    @dg.asset
    def one(context: dg.AssetExecutionContext) -> None:
        context.log.info("before")
        bad = dg.AssetMaterialization("elsewhere", partition="a\0b")
        context.log_event(bad)
        context.log.info("after")

    result = dg.materialize([one], instance=instance, raise_on_error=False)
    messages = [event.user_message for event in reader.all_logs(result.run_id)]
    assert {"before", "after"} <= set(messages)


def test_materializations_that_cannot_be_expanded_do_not_affect_the_other_events(
    instance: dg.DagsterInstance, reader: dg.DagsterInstance
) -> None:
    log = instance.event_log_storage
    assert isinstance(log, BatchedEventLog)

    @dg.asset
    def one(context: dg.AssetExecutionContext) -> None:
        context.log.info("before")
        refused = {"a": {"rows": object()}, "b": {}}
        log.expand_materialization(context.run.run_id, dg.AssetKey("elsewhere"), refused)
        context.log_event(dg.AssetMaterialization("elsewhere", partition="b"))
        context.log.info("after")

    result = dg.materialize([one], instance=instance, raise_on_error=False)
    messages = [event.user_message for event in reader.all_logs(result.run_id)]
    assert {"before", "after"} <= set(messages)


def test_events_wait_while_the_database_cannot_be_reached(
    instance: dg.DagsterInstance, reader: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = instance.event_log_storage
    assert isinstance(log, BatchedEventLog)

    @dg.asset
    def one(context: dg.AssetExecutionContext) -> None:
        context.log.info("kept")
        with monkeypatch.context() as patch:
            fail_batches(patch, sqlalchemy.exc.OperationalError("", None, ConnectionError()))
            with pytest.raises(sqlalchemy.exc.OperationalError):
                log.flush()

    result = dg.materialize([one], instance=instance)
    assert [event for event in reader.all_logs(result.run_id) if event.user_message == "kept"]


def test_a_batch_that_cannot_be_written_is_logged_once_and_its_events_are_stored(
    instance: dg.DagsterInstance,
    reader: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @dg.asset
    def one(context: dg.AssetExecutionContext) -> None:
        context.log.info("kept")

    fail_batches(monkeypatch, ValueError("Wintergarten"))
    with caplog.at_level(logging.WARNING, "fhir_assets"):
        results = [dg.materialize([one], instance=instance) for _ in range(2)]
    for result in results:
        assert "kept" in [event.user_message for event in reader.all_logs(result.run_id)]
    warnings = [record for record in caplog.records if record.name == storage.__name__]
    assert [(record.levelname, record.error) for record in warnings] == [("WARNING", "ValueError")]  # type: ignore[attr-defined]
    assert "one by one" in warnings[0].message
    assert "Wintergarten" not in caplog.text
