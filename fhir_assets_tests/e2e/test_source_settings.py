"""A deployment whose server, windows or start change: loads are refused until the state is carried over or removed."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fhir_assets.definitions import build_definitions
from fhir_assets.deployment.landing import build_receiver
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.record import Deletion, build_record, read_header
from fhir_assets.orchestration.jobs import INCREMENTAL_LOAD
from fhir_assets.pipeline.sources.transition import SourceTransition, TransitionResult
from fhir_assets.sandbox.process import SandboxServer
from fhir_assets.settings import load_settings
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.warehouse.exports.export import Export
from fhir_assets.warehouse.ops import runs
from fhir_assets_tests.support.content import add, materialize, patient
from fhir_assets_tests.support.deployment import Deploy, Deployment

pytestmark = pytest.mark.slow

SINCE = "2024-01-01"
NOW = datetime.now(UTC)
THIS_MONTH = NOW.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
RECENT = (NOW - timedelta(days=40)).replace(hour=10)


def patients(*names: str, at: datetime = RECENT) -> list[bytes]:
    return [patient(name, at) for name in names]


def change(deployment: Deployment, **settings: object) -> Deployment:
    """Return the deployment with other settings, in the same folder and database."""
    kept = {name: getattr(deployment.settings, name) for name in deployment.settings.model_fields_set}
    return replace(deployment, settings=load_settings(**{**kept, **settings}))


def ingest(deployment: Deployment) -> None:
    outcomes = deployment.ingest()
    assert [outcome.success for outcome in outcomes] == [True] * len(outcomes)
    assert [message for outcome in outcomes for message in deployment.unreconciled(outcome)] == []


def ids(deployment: Deployment) -> list[str]:
    return [identity for (identity,) in deployment.query("SELECT id FROM fhir.patient ORDER BY 1")]


def receive(deployment: Deployment, body: bytes, origin: str) -> None:
    record = build_record(body, read_header(body), datetime.now(UTC))
    build_receiver(deployment.settings, Warehouse(deployment.settings)).receive([record], origin)
    for windows in deployment.ingestion().find_received():
        assert deployment.ingestion().load_received(windows, triggered_by="test").success


@pytest.fixture
def deploy_patients(deploy: Deploy) -> Callable[..., Deployment]:
    def make(server: SandboxServer, **settings: object) -> Deployment:
        values = {"fhir_resource_types": "Patient", "fhir_last_updated_gte": SINCE, "fhir_partition": "monthly"}
        return deploy(fhir_base_url=server.url, **{**values, **settings})

    return make


def test_every_way_to_load_from_another_server_is_refused_with_the_same_sentence(
    deploy_patients: Callable[..., Deployment],
) -> None:
    with SandboxServer(patients("a1")) as one, SandboxServer(patients("b1")) as two:
        deployment = deploy_patients(one)
        ingest(deployment)
        moved = change(deployment, fhir_base_url=two.url)
        with pytest.raises(ConfigurationError, match="FHIR_BASE_URL was http://") as caught:
            moved.ingest()
        sentence = str(caught.value)
        key = f"{RECENT:%Y-%m}-01"
        for layer in ("raw", "validated", "normalized"):
            result = materialize(moved, f"{layer}/patient", windows=[key])
            assert not result.success
            (failure,) = result.filter_events(lambda event: event.is_step_failure)
            assert failure.step_failure_data.user_failure_data is not None
            assert failure.step_failure_data.user_failure_data.description == sentence
            assert moved.query("SELECT error FROM ops.ingestion_runs WHERE run_id = %s", result.run_id) == [(sentence,)]
        repository = build_definitions(moved.settings).get_repository_def()
        with (
            dg.build_schedule_context(
                instance=moved.instance, repository_def=repository, scheduled_execution_time=NOW
            ) as context,
            pytest.raises(dg.DagsterError) as failed,
        ):
            repository.get_schedule_def(INCREMENTAL_LOAD).evaluate_tick(context)
        assert str(failed.value.__cause__) == sentence
        with pytest.raises(ConfigurationError, match="FHIR_BASE_URL was"):
            receive(moved, patient("posted", RECENT), "api:1")
    assert ids(deployment) == ["a1"]


def test_starting_anew_leaves_nothing_of_the_old_server_but_all_of_other_channels(
    deploy_patients: Callable[..., Deployment],
) -> None:
    shared_id = patient("shared", RECENT, gender="female")
    invalid = patient("bad", RECENT, gender=7)
    with SandboxServer([*patients("a1"), shared_id, invalid]) as one, SandboxServer(patients("b1", "shared")) as two:
        deployment = deploy_patients(one)
        ingest(deployment)
        receive(deployment, patient("posted", RECENT), "api:1")
        receive(deployment, patient("referred", RECENT), "missing:run/Patient/1")
        build_receiver(deployment.settings, Warehouse(deployment.settings)).deletion_log.record(
            [Deletion("Patient", "b1", NOW + timedelta(days=1))], run_id="one"
        )
        assert ids(deployment) == ["a1", "posted", "referred", "shared"]
        moved = change(deployment, fhir_base_url=two.url)
        result = moved.change_source(SourceTransition.start_anew)
        assert result.removed >= 4
        assert ids(moved) == ["posted"]
        assert moved.count_dead_letters() == {}
        ingest(moved)
        assert ids(moved) == ["b1", "posted", "shared"]
        assert moved.query("SELECT gender FROM fhir.patient WHERE id = 'shared'") == [(None,)]
        assert moved.query("SELECT resolution FROM ops.dead_letters") == [("the source was started anew",)]
        with pytest.raises(ConfigurationError, match="FHIR_BASE_URL"):
            deployment.ingest()


def test_a_server_that_moved_is_carried_over_and_goes_on_from_the_checkpoint(
    deploy_patients: Callable[..., Deployment],
) -> None:
    with SandboxServer(patients("a")) as one, SandboxServer(patients("a")) as two:
        deployment = deploy_patients(one)
        ingest(deployment)
        add(two, patient("new", datetime.now(UTC)))
        moved = change(deployment, fhir_base_url=two.url)
        assert moved.change_source(SourceTransition.carry_over).set_aside == 0
        two.reset_stats()
        ingest(moved)
        assert ids(moved) == ["a", "new"]


@pytest.mark.parametrize(("first", "then"), [("daily", "monthly"), ("monthly", "daily"), ("hourly", "monthly")])
def test_other_windows_miss_nothing_after_a_load_that_broke_off(
    deploy_patients: Callable[..., Deployment], first: str, then: str
) -> None:
    days = [THIS_MONTH - timedelta(days=n) for n in (1, 12, 33, 40, 62)] + [NOW - timedelta(minutes=1)]
    names = [f"p{n}" for n in range(len(days))]
    bodies = [patient(name, day) for name, day in zip(names, days, strict=True)]
    with SandboxServer(bodies) as server:
        start = days[-2].date().isoformat()
        deployment = deploy_patients(server, fhir_partition=first, fhir_last_updated_gte=start)
        ingestion = deployment.ingestion()
        due = ingestion.due_loads.find()
        ingestion.due_loads.begin_checkpoints(due)
        scheme = deployment.settings.window_scheme
        until = scheme.window_at(THIS_MONTH - timedelta(days=25))
        for outcome in deployment.ingest(first=days[-2], last=until.end - timedelta(seconds=1)):
            assert outcome.success
        receive(deployment, patient("posted", days[1]), "api:1")
        receive(deployment, b'{"resourceType":"Patient","id":"undated"}', "api:2")
        changed = change(deployment, fhir_partition=then)
        with pytest.raises(ConfigurationError, match=f"FHIR_PARTITION was {first} .* is {then} now"):
            changed.ingest()
        changed.change_source(SourceTransition.carry_over)
        ingest(changed)
        assert ids(changed) == sorted([*names, "posted", "undated"])
        rebuilt = changed.query("SELECT count(*) FROM ops.received WHERE loaded_at IS NULL")
        assert rebuilt == [(0,)]
        for manifest in changed.store.manifests("raw", "Patient", changed.store.partition_keys("raw", "Patient")):
            assert changed.settings.window_scheme.window(manifest.partition_key).key == manifest.partition_key


@pytest.mark.parametrize("start", [None, "2023-01-01"])
def test_an_earlier_start_loads_what_is_older(deploy_patients: Callable[..., Deployment], start: str | None) -> None:
    old, new = datetime(2023, 5, 5, tzinfo=UTC), RECENT
    with SandboxServer([patient("old", old), patient("new", new)]) as server:
        deployment = deploy_patients(server)
        ingest(deployment)
        assert ids(deployment) == ["new"]
        changed = change(deployment, fhir_last_updated_gte=start)
        with pytest.raises(ConfigurationError, match="FHIR_LAST_UPDATED_GTE was 2024-01-01"):
            changed.ingest()
        changed.change_source(SourceTransition.carry_over)
        ingest(changed)
        assert ids(changed) == ["new", "old"]


def test_a_later_start_keeps_the_tables_and_received_resources(deploy_patients: Callable[..., Deployment]) -> None:
    old = datetime(2024, 1, 5, tzinfo=UTC)
    with SandboxServer([patient("old", old), patient("new", RECENT)]) as server:
        deployment = deploy_patients(server)
        ingest(deployment)
        receive(deployment, patient("posted", old), "api:1")
        changed = change(deployment, fhir_last_updated_gte=RECENT.date().isoformat())
        changed.change_source(SourceTransition.carry_over)
        add(server, patient("later", datetime.now(UTC)))
        ingest(changed)
        assert ids(changed) == ["later", "new", "old", "posted"]


def test_an_export_of_a_group_is_not_taken_for_one_of_all_patients(
    deploy_patients: Callable[..., Deployment],
) -> None:
    with SandboxServer(patients("a", "b")) as server:
        deployment = deploy_patients(
            server, fhir_source="bulk", fhir_bulk_type_filter="Patient?_id=a", fhir_bulk_fresh_minutes=0
        )
        ingest(deployment)
        changed = change(deployment, fhir_bulk_type_filter="")
        with pytest.raises(ConfigurationError, match="FHIR_BULK_TYPE_FILTER was Patient"):
            changed.ingest()
        changed.change_source(SourceTransition.carry_over)
        ingest(changed)
        assert ids(changed) == ["a", "b"]


def test_a_deployment_of_an_earlier_version_adopts_its_settings(deploy_patients: Callable[..., Deployment]) -> None:
    with SandboxServer(patients("a")) as server:
        deployment = deploy_patients(server)
        ingest(deployment)
        deployment.query("WITH s AS (DELETE FROM ops.sources RETURNING 1) DELETE FROM ops.deployment RETURNING 1")
        (Path(deployment.settings.store_url) / "store.json").unlink()
        ingest(deployment)
        assert ids(deployment) == ["a"]
        with pytest.raises(ConfigurationError, match="FHIR_PARTITION"):
            change(deployment, fhir_partition="daily").ingest()


def test_a_running_load_is_not_disturbed(deploy_patients: Callable[..., Deployment]) -> None:
    with SandboxServer(patients("a")) as server:
        deployment = deploy_patients(server)
        ingest(deployment)
        warehouse = Warehouse(deployment.settings)
        with warehouse.hold_run("alive"), warehouse.connect() as conn:
            conn.execute(
                "INSERT INTO ops.ingestion_runs (run_id, resource_type, partition_key, status)"
                " VALUES ('alive', 'Patient', '2024-01-01', 'RUNNING')"
            )
            conn.commit()
            for what in (SourceTransition.carry_over, SourceTransition.start_anew):
                with pytest.raises(ConfigurationError, match="1 runs are loading data"):
                    deployment.change_source(what)
        assert ids(deployment) == ["a"]


@pytest.mark.parametrize("what", [SourceTransition.carry_over, SourceTransition.start_anew])
def test_a_load_that_begins_during_a_transition_is_not_disturbed(
    deploy_patients: Callable[..., Deployment],
    monkeypatch: pytest.MonkeyPatch,
    what: Callable[[SourceTransition], TransitionResult],
) -> None:
    with SandboxServer(patients("a")) as server:
        deployment = deploy_patients(server)
        ingest(deployment)
        other = change(deployment, fhir_partition="daily")
        rearrange = SourceTransition._rearrange

        def begin_load(*arguments: Any, **options: Any) -> Any:
            with Warehouse(deployment.settings).connect() as conn:
                runs.start(conn, "late", ["Patient"], ["2024-01-01"], triggered_by="test", at=datetime.now(UTC))
            return rearrange(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(SourceTransition, "_rearrange", begin_load)
            with pytest.raises(ConfigurationError, match="1 runs are loading data"):
                other.change_source(what)
        assert ids(deployment) == ["a"]
        other.change_source(what)


def export_valid(deployment: Deployment, folder: Path) -> list[str]:
    """Export the valid Patients, and return their ids, sorted."""
    with (
        Warehouse(deployment.settings).connect() as conn,
        Export(conn, deployment.store, LocalBlobs(folder), "e", actor="test", withholding=False) as export,
    ):
        export.for_type("Patient", None).write_valid()
        export.finish()
    lines = (folder / "e" / "Patient.valid.ndjson").read_bytes().splitlines()
    return sorted(json.loads(line)["id"] for line in lines)


@pytest.mark.parametrize(
    "settings",
    [{"fhir_partition": "daily"}, {"fhir_last_updated_gte": f"{THIS_MONTH:%Y-%m-%d}"}, {"fhir_max_attempts": 2}],
    ids=["windows", "start", "none"],
)
def test_an_export_after_a_carry_over_has_every_valid_resource_of_the_tables_once(
    deploy_patients: Callable[..., Deployment], tmp_path: Path, settings: dict[str, object]
) -> None:
    first_of_month = RECENT.replace(day=1)
    bodies = [*patients("a1", "a2"), *patients("same-key", at=first_of_month)]
    with SandboxServer([*bodies, patient("bad", RECENT, gender=7), *patients("new", at=NOW)]) as server:
        deployment = deploy_patients(server)
        ingest(deployment)
        receive(deployment, patient("posted", RECENT), "api:1")
        moved = change(deployment, **settings)
        moved.change_source(SourceTransition.carry_over)
        # The key of the first day of a month is also the key of the month, whose resources were set aside.
        receive(moved, patient("posted-later", first_of_month), "api:2")
        expected = ids(moved)
        assert set(expected) >= {"a1", "a2", "same-key", "posted", "posted-later", "new"}
        assert export_valid(moved, tmp_path) == expected
        ingest(moved)
        assert export_valid(moved, tmp_path) == ids(moved) == expected
