"""The batched event log and dagster-postgres' own storage write the same rows for the same run."""

import json
import re
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fhir_assets.orchestration.window_materializations import log_window_materializations
from fhir_assets.orchestration.window_metadata import add_window_metadata
from fhir_assets.warehouse.postgres.db.connections import connect, normalise_url

pytestmark = [
    pytest.mark.filterwarnings("ignore::dagster.BetaWarning"),
    pytest.mark.filterwarnings("ignore::dagster.PreviewWarning"),
]

DAYS = dg.DailyPartitionsDefinition("2024-01-01", end_date="2024-01-04")
RANGE = {
    "dagster/asset_partition_range_start": "2024-01-01",
    "dagster/asset_partition_range_end": "2024-01-03",
}
OURS: dict[str, object] = {
    "custom": {"module": "fhir_assets.orchestration.instance.storage", "class": "PooledPostgresStorage"}
}

HASH = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{32,64}")
"""Ids of runs, and the data versions that are computed from them."""

Row = tuple[object, ...]


def build_assets() -> list[dg.AssetsDefinition]:
    """Return a step with checks of windows and of a table, and a step that fails."""

    @dg.multi_asset(
        specs=[dg.AssetSpec(["layer", name], partitions_def=DAYS) for name in ("one", "two")],
        check_specs=[
            dg.AssetCheckSpec("by_day", asset=["layer", "one"], partitions_def=DAYS),
            dg.AssetCheckSpec("whole", asset=["layer", "two"]),
        ],
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def both(context: dg.AssetExecutionContext) -> Any:
        context.log_event(dg.AssetObservation(["layer", "one"], description="seen", metadata={"at": float("nan")}))
        for key in ("one", "two"):
            yield dg.MaterializeResult(asset_key=["layer", key], metadata={"rows": 7}, tags={"color": "green"})
        for day in context.partition_keys:
            context.log_event(
                dg.AssetCheckEvaluation(
                    asset_key=dg.AssetKey(["layer", "one"]),
                    check_name="by_day",
                    passed=day.endswith("2"),
                    partition=day,
                )
            )
        context.log_event(
            dg.AssetCheckEvaluation(asset_key=dg.AssetKey(["layer", "two"]), check_name="not_planned", passed=True)
        )
        yield dg.AssetCheckResult(asset_key=["layer", "one"], check_name="by_day", passed=False)
        yield dg.AssetCheckResult(asset_key=["layer", "two"], check_name="whole", passed=True)

    @dg.multi_asset(
        outs={
            name: dg.AssetOut(key=["written", name], io_manager_key="windows", code_version="7", is_required=False)
            for name in ("first", "second", "left_out")
        },
        deps=[["layer", "one"]],
        partitions_def=DAYS,
        backfill_policy=dg.BackfillPolicy.single_run(),
        can_subset=True,
    )
    def written() -> Any:
        yield dg.Output(5, output_name="first", metadata={"given": "by the step"})
        yield dg.Output(6, output_name="second")

    @dg.multi_asset(
        outs={
            "ours": dg.AssetOut(key=["mixed", "ours"], io_manager_key="windows"),
            "other": dg.AssetOut(key=["mixed", "other"], io_manager_key="nothing"),
        },
        partitions_def=DAYS,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def mixed() -> Any:
        yield dg.Output(7, output_name="ours")
        yield dg.Output(8, output_name="other")

    @dg.asset(partitions_def=DAYS, backfill_policy=dg.BackfillPolicy.single_run(), deps=[["written", "second"]])
    def failing() -> None:
        raise dg.Failure("no reason", allow_retries=False)

    return [both, written, mixed, failing]


class NoIOManager(dg.IOManager):
    """Writes nothing, and leaves the materializations to Dagster."""

    def handle_output(self, context: dg.OutputContext, obj: int) -> None:
        pass

    def load_input(self, context: dg.InputContext) -> None:
        raise NotImplementedError


class WindowIOManager(dg.IOManager):
    """Adds metadata to each window, as the IO managers of the project do."""

    def handle_output(self, context: dg.OutputContext, obj: int) -> None:
        keys = context.asset_partition_keys
        windows: dict[str, dict[str, Any]] = {
            key: {"rows": number, "name": f"{key} \\ ü"} for number, key in enumerate(keys)
        }
        windows[keys[-1]] |= {
            "path": dg.MetadataValue.path('a "quoted" path'),
            "seen": True,
            "table": {"a": [1, "x"]},
            "share": float("nan") if obj == 6 else 0.5,
        }
        context.add_output_metadata({"common": obj})
        add_window_metadata(context.step_context, context.asset_key, windows)
        log_window_materializations(context)

    def load_input(self, context: dg.InputContext) -> None:
        raise NotImplementedError


def run(database: str, folder: Path, storage: dict[str, Any]) -> None:
    """Execute a range run that fails at its last step."""
    folder.mkdir()
    url = {"postgres_url": normalise_url(database, "psycopg2")}
    config = {"custom": {**storage["custom"], "config": url}} if "custom" in storage else {"postgres": url}
    with dg.DagsterInstance.local_temp(str(folder), overrides={"storage": config}) as instance:
        result = dg.materialize(
            build_assets(),
            instance=instance,
            tags=RANGE,
            raise_on_error=False,
            resources={"windows": WindowIOManager(), "nothing": NoIOManager()},
        )
        assert not result.success


def read_rows(database: str) -> dict[str, list[Row]]:
    """Return the rows of the event log's tables. Ids of events are their positions; times and ids of runs are #."""
    with connect(database) as conn:
        events = conn.execute(
            "SELECT id, dagster_event_type, step_key, asset_key, partition, event FROM event_logs ORDER BY id"
        ).fetchall()
        position = {None: None} | {row[0]: number for number, row in enumerate(events)}
        assets = conn.execute(
            "SELECT asset_key, last_materialization, wipe_timestamp, asset_details, tags,"
            " last_materialization_timestamp IS NULL, last_run_id IS NULL FROM asset_keys ORDER BY 1"
        ).fetchall()
        tags = conn.execute("SELECT event_id, asset_key, key, value FROM asset_event_tags ORDER BY 1, 3").fetchall()
        checks = conn.execute(
            "SELECT evaluation_event_storage_id, materialization_event_storage_id, asset_key, check_name, partition,"
            " execution_status, evaluation_event FROM asset_check_executions"
            " ORDER BY asset_key, check_name, partition, id"
        ).fetchall()
    return {
        "event_logs": [(*row[1:5], scrub(row[5])) for row in events],
        "asset_keys": [(row[0], scrub(row[1]), *row[2:]) for row in assets],
        "asset_event_tags": [(position[row[0]], *row[1:3], HASH.sub("#", row[3])) for row in tags],
        "asset_check_executions": [(position[row[0]], position[row[1]], *row[2:6], scrub(row[6])) for row in checks],
    }


def scrub(text: str | None) -> object:
    """Return an event as parsed JSON without what differs between two runs."""
    if text is None:
        return None
    return _without_numbers(json.loads(HASH.sub("#", text)))


def _without_numbers(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_numbers(item) for key, item in value.items() if key != "log_key"}
    if isinstance(value, list):
        return [_without_numbers(item) for item in value]
    if isinstance(value, float) or (isinstance(value, int) and value > 1000):
        return "#"
    if isinstance(value, str):
        return re.sub(r"\d+(\.\d+)?(ms|s)\b|pid: \d+|0x[0-9a-f]+|/\S*/(ours|stock)\S*", "#", value)
    return value


def test_both_storages_write_the_same_rows_for_a_range_run(database: str, empty_database: str, tmp_path: Path) -> None:
    run(database, tmp_path / "ours", OURS)
    run(empty_database, tmp_path / "stock", {"postgres": {}})
    ours, stock = read_rows(database), read_rows(empty_database)
    assert all(ours.values())
    for table in ours:
        assert len(ours[table]) == len(stock[table]), table
        for own, other in zip(ours[table], stock[table], strict=True):
            assert own == other, table
