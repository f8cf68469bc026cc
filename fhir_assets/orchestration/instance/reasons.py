"""The Dagster instance of the project's ``dagster.yaml``: a run or step whose process ended has a reason in the UI.

A daemon whose clock is set back ends, see ``clock_watch``.

Dagster's code server, daemon and launchers fail a run of a process that ended through ``report_run_failed``, without a
reason or with a guess, and leave its steps running.
"""

import dagster as dg

from fhir_assets.orchestration.dagster_internals import (
    DaemonHeartbeat,
    DagsterEventBatchMetadata,
    InstanceRef,
    JobFailureData,
    RunFailureReason,
    StepFailureData,
)
from fhir_assets.orchestration.instance.clock_watch import ClockGuard
from fhir_assets.orchestration.run_ends import (
    build_step_failure,
    explain_crashed_step,
    explain_failure,
    fail_open_steps,
)

_CLOCK_GUARD = ClockGuard()
_CRASHED_CHILD = "ChildProcessCrashException"


class ReasonedInstance(dg.DagsterInstance):
    """Dagster's instance, which says why a run or a step ended that could not say so itself."""

    @classmethod
    def config_schema(cls) -> dict[str, object]:
        """Return no configuration in addition to that of Dagster; Dagster calls this."""
        return {}

    @classmethod
    def config_defaults(cls, base_dir: str) -> object:
        """Return Dagster's defaults; Dagster calls this."""
        return InstanceRef.config_defaults(base_dir)

    def report_run_failed(
        self, dagster_run: dg.DagsterRun, message: str | None = None, job_failure_data: JobFailureData | None = None
    ) -> dg.DagsterEvent:
        """Mark a run as failed with the reason, and before it the steps that were under way."""
        begins = job_failure_data is None or job_failure_data.failure_reason is not RunFailureReason.START_TIMEOUT
        reason = explain_failure(self, dagster_run, message, begins=begins)
        fail_open_steps(self, dagster_run, reason)
        return super().report_run_failed(dagster_run, reason, job_failure_data)

    def report_run_canceled(self, dagster_run: dg.DagsterRun, message: str | None = None) -> dg.DagsterEvent:
        """Mark a run as cancelled, and before it the steps that were under way as failed."""
        fail_open_steps(self, dagster_run, message or "The run was marked as cancelled while this step was under way.")
        return super().report_run_canceled(dagster_run, message)

    def add_daemon_heartbeat(self, daemon_heartbeat: DaemonHeartbeat) -> None:
        """Store a heartbeat of Dagster's daemon; the process of the daemon ends if its clock is set back."""
        _CLOCK_GUARD.start()
        super().add_daemon_heartbeat(daemon_heartbeat)

    def handle_new_event(
        self, event: dg.EventLogEntry, *, batch_metadata: DagsterEventBatchMetadata | None = None
    ) -> None:
        """Store an event. The failure of a step whose process crashed gets the reason."""
        failed = event.dagster_event
        if failed is not None and failed.event_type_value == "STEP_FAILURE" and _has_crashed(failed):
            reason = explain_crashed_step(self, event.run_id)
            if reason is not None:
                data = build_step_failure(reason)
                event = event._replace(dagster_event=failed._replace(event_specific_data=data, message=reason))
        super().handle_new_event(event, batch_metadata=batch_metadata)


def _has_crashed(event: dg.DagsterEvent) -> bool:
    data = event.event_specific_data
    error = data.error if isinstance(data, StepFailureData) else None
    return error is not None and error.cls_name == _CRASHED_CHILD
