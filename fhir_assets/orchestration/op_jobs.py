"""Jobs made of ops: ``fetch_missing_references``, ``apply_consent`` and ``request_replay``.

Jobs that materialize or check assets are in ``jobs.py``.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import dagster as dg

from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.landing import build_receiver
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.source import Source
from fhir_assets.fhir.views import View, ViewSet
from fhir_assets.orchestration import replayable_windows
from fhir_assets.orchestration.failures import sanitized_errors
from fhir_assets.orchestration.jobs import APPLY_CONSENT, FETCH_MISSING_REFERENCES, REQUEST_REPLAY
from fhir_assets.orchestration.received_windows import build_materializations
from fhir_assets.orchestration.tags import FHIR_SERVER_POOL
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.pipeline.missing_references.step import MissingReferencesStep, ReadsById
from fhir_assets.settings import Settings
from fhir_assets.warehouse.ops.dead_letters import Selection


def build_fetch_missing_references(settings: Settings, views: Sequence[View]) -> dg.JobDefinition:
    """Return the job that reads missing resources, to which loaded resources refer, from the source by id.

    It reads in batches, Patients first, and writes the resources to raw; the sensor ``load_received`` loads them.
    """

    @dg.op(
        name="read_missing_references",
        description="Read the missing resources in batches, and write them to raw.",
        pool=FHIR_SERVER_POOL,
        out=dg.Out(dg.Nothing),
        required_resource_keys={"source", "warehouse"},
    )
    def read_missing_references(
        context: dg.OpExecutionContext,
    ) -> Iterator[dg.AssetMaterialization | dg.Output[None]]:
        source: Source = context.resources.source
        warehouse: Warehouse = context.resources.warehouse
        if not isinstance(source, ReadsById):
            yield dg.Output(None, metadata={"skipped": f"the source {source.name} cannot read resources by id"})
            return
        offered = source.list_types()
        types = [name for name in settings.fhir_resource_types if offered is None or name in offered]
        receiver = build_receiver(settings, warehouse)
        with sanitized_errors():
            receiver.check()
        step = MissingReferencesStep(warehouse.connect, views, types, source, receiver, run_id=context.run.run_id)
        asked: Counter[str] = Counter()
        returned: Counter[str] = Counter()
        deleted: Counter[str] = Counter()
        with sanitized_errors():
            for batch in step.run():
                asked[batch.resource_type] += batch.requested
                returned[batch.resource_type] += batch.found
                deleted[batch.resource_type] += batch.deleted
                yield from build_materializations(batch.received)
        yield dg.Output(None, metadata={"asked": dict(asked), "found": dict(returned), "deleted": dict(deleted)})

    @dg.job(
        name=FETCH_MISSING_REFERENCES,
        executor_def=dg.in_process_executor,
        description="Read resources to which loaded resources refer, but which are not loaded, from the FHIR server by "
        "id, Patients first.",
    )
    def fetch_missing_references() -> None:
        read_missing_references()

    return fetch_missing_references


def build_apply_consent(settings: Settings, views: ViewSet) -> dg.JobDefinition:
    """Return the job that withholds or releases resources in the tables according to the current consents."""

    @dg.op(description="Withhold resources that consent no longer covers; load withheld resources that it now covers.")
    def apply_consent_op(context: dg.OpExecutionContext, warehouse: dg.ResourceParam[Warehouse]) -> None:
        step = ConsentStep(
            warehouse.connect,
            views.views,
            build_consent_gate(settings),
            run_id=context.run_id,
            actor=f"job:{APPLY_CONSENT}",
        )
        with sanitized_errors():
            counts = step.run(datetime.now(UTC))
        context.add_output_metadata(
            {
                "patients": counts.patients,
                "decisions_changed": counts.decisions,
                "resources_withheld": counts.withheld,
                "resources_released": counts.released,
            }
        )

    @dg.job(
        name=APPLY_CONSENT,
        executor_def=dg.in_process_executor,
        description="Withhold or release resources in the tables according to the current consents.",
    )
    def apply_consent() -> None:
        apply_consent_op()

    return apply_consent


_ANY = "any"
_STAGES = ("validate", "transform", "load")


def build_request_replay(settings: Settings) -> dg.JobDefinition:
    """Return the job that marks dead letters for a replay. Its config selects them by type, rule, stage and window.

    The sensor ``replay_dead_letters`` starts the runs that replay them.
    """
    # Dagster reuses a config schema in a process if names and descriptions are equal, even if enums have other values.
    # The types are in the description, so that the schemas of two deployments differ.
    types = ", ".join(settings.fhir_resource_types)
    schema = {
        "resource_type": dg.Field(
            dg.Enum("ResourceType", [dg.EnumValue(name) for name in (_ANY, *settings.fhir_resource_types)]),
            default_value=_ANY,
            is_required=False,
            description=f"Replay only dead letters of this resource type: {types}.",
        ),
        "rule": dg.Field(
            str,
            default_value=_ANY,
            is_required=False,
            description="Replay only dead letters of this rule, for example required-binding. The check "
            "dead_letter_rate and `fhir-assets dead-letters list` name the rules.",
        ),
        "stage": dg.Field(
            dg.Enum("Stage", [dg.EnumValue(name) for name in (_ANY, *_STAGES)]),
            default_value=_ANY,
            is_required=False,
            description="Replay only dead letters of this stage.",
        ),
        "windows": dg.Field(
            [str],
            default_value=[],
            is_required=False,
            description="Replay only dead letters of these partitions; an empty list stands for all.",
        ),
    }

    @dg.op(config_schema=schema, description="Mark the selected open dead letters for a replay.")
    def mark_dead_letters(context: dg.OpExecutionContext, warehouse: dg.ResourceParam[Warehouse]) -> None:
        chosen = {name: value for name, value in context.op_config.items() if value not in (_ANY, [])}
        selection = Selection(
            resource_type=chosen.get("resource_type"),
            rule=chosen.get("rule"),
            stage=chosen.get("stage"),
            partition_keys=chosen.get("windows"),
        )
        with sanitized_errors(), warehouse.connect() as conn:
            marked = replayable_windows.request_replay(conn, settings, selection)
            conn.commit()
        context.add_output_metadata({"dead_letters_marked": marked})

    @dg.job(
        name=REQUEST_REPLAY,
        executor_def=dg.in_process_executor,
        description="Replay dead letters by type, rule, stage or window, as the config in the Launchpad selects them. "
        "The job marks them; the sensor replay_dead_letters starts the runs that replay them within half a minute.",
    )
    def request_replay() -> None:
        mark_dead_letters()

    return request_replay
