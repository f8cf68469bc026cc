"""Events packed in a batch are read by Dagster as the events that Dagster packs one by one."""

import json
from collections.abc import Iterator
from math import nan

import dagster as dg
import pytest
from dagster_shared.serdes import deserialize_value, serialize_value

from fhir_assets.orchestration.checks.metadata import rows_table
from fhir_assets.orchestration.instance.event_json import pack_events

pytestmark = [
    pytest.mark.filterwarnings("ignore::dagster.BetaWarning"),
    pytest.mark.filterwarnings("ignore::dagster.PreviewWarning"),
]

DAYS = dg.StaticPartitionsDefinition(["a", "b", "c"])


@pytest.fixture(scope="module")
def events() -> Iterator[list[dg.EventLogEntry]]:
    """The events of a range run and of a failed run, with unusual values."""
    check = dg.AssetCheckSpec("good", asset="one", partitions_def=DAYS)

    @dg.asset(partitions_def=DAYS, check_specs=[check], backfill_policy=dg.BackfillPolicy.single_run())
    def one(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        context.log.info("at work \N{SNOWMAN}")
        for key in context.partition_keys:
            context.add_asset_metadata({"of": {key: [1, 2.5, None, True]}}, partition_key=key)
        table = rows_table(("window", "rows:int"), [("a", 1), ("b", 2)])
        yield dg.MaterializeResult(
            check_results=[dg.AssetCheckResult(passed=False, metadata={"table": table})],
            metadata={"rows": 1, "rate": 0.25, "path": dg.MetadataValue.path("/tmp"), "kept": dg.MetadataValue.null()},
            tags={"a": "b"},
        )

    @dg.asset
    def two() -> dg.MaterializeResult[None]:
        return dg.MaterializeResult(metadata={"strange": float("inf"), "stranger": {"deep": nan, "big": 2**70}})

    @dg.asset
    def three() -> None:
        raise ValueError("as expected")

    with dg.instance_for_test() as instance:
        tags = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "c"}
        first = dg.materialize([one], instance=instance, tags=tags)
        second = dg.materialize([two, three], instance=instance, raise_on_error=False)
        assert first.success
        assert not second.success
        yield [*instance.all_logs(first.run_id), *instance.all_logs(second.run_id)]


def test_packed_events_read_the_same_as_events_that_dagster_packs(events: list[dg.EventLogEntry]) -> None:
    assert {e.dagster_event_type.value for e in events if e.dagster_event_type} >= {
        *("ASSET_MATERIALIZATION_PLANNED", "ASSET_MATERIALIZATION", "ASSET_CHECK_EVALUATION_PLANNED"),
        *("ASSET_CHECK_EVALUATION", "STEP_OUTPUT", "STEP_FAILURE", "PIPELINE_FAILURE"),
    }
    # Twice, so that every object occurs again.
    for event, text in zip([*events, *events], pack_events([*events, *events]), strict=True):
        expected = serialize_value(event)
        assert json.loads(text, parse_constant=str) == json.loads(expected, parse_constant=str)
        if "NaN" not in expected:
            assert deserialize_value(text, dg.EventLogEntry) == event


def test_an_object_is_not_mistaken_for_an_earlier_object_with_the_same_id(events: list[dg.EventLogEntry]) -> None:
    others = (events[0]._replace(user_message=str(number)) for number in range(500))
    assert [json.loads(text)["user_message"] for text in pack_events(others)] == [str(number) for number in range(500)]
