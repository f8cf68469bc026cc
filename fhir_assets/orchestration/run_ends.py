"""Why a run ended that could not say so itself: one sentence for the Dagster UI, `ops.ingestion_runs` and alerts.

A process that is killed writes no event. Whoever notices it (Dagster's code server, its daemon, a sensor, the next
command) fails the run through ``report_failure``, which also ends the steps that were under way.
"""

import logging
import re
from datetime import datetime

import dagster as dg

from fhir_assets.orchestration.dagster_internals import (
    EngineEventData,
    SerializableErrorInfo,
    StepFailureData,
    UserFailureData,
)
from fhir_assets.orchestration.run_processes import find_process
from fhir_assets.process_ends import (
    MEMORY_ADVICE,
    ProcessIdentity,
    compare_kills,
    describe_exit,
    exists,
    name_exit,
    read_identity,
)

AGAIN = "What was not committed is loaded by the next run of the same windows; nothing is lost"

_NO_REASON = "This run has been marked as failed from outside the execution context."
_SIGNAL = re.compile(r"was terminated by signal (\d+) ")
_EXIT_CODE = re.compile(r"unexpectedly exited with code (-?\d+)\.")
_HEALTH = re.compile(r"Detected run worker status \S+: '(?P<told>.*)'\. (?:Marking run|Resuming run) .*?failed", re.S)
_POD_EXIT = re.compile(r"Terminated with exit code (?P<code>\d+): (?P<reason>\w+)")
_LOST_STORAGE = ("OperationalError", "InterfaceError", "DagsterPostgresException")
_PROCESS_ENDED = "ProcessEnded"
"""The class of the error of a step whose process ended."""

_STEP_EVENTS = {
    dg.DagsterEventType.STEP_START,
    dg.DagsterEventType.STEP_RESTARTED,
    dg.DagsterEventType.STEP_SUCCESS,
    dg.DagsterEventType.STEP_FAILURE,
    dg.DagsterEventType.STEP_SKIPPED,
    dg.DagsterEventType.STEP_UP_FOR_RETRY,
}
_STEP_BEGINS = {dg.DagsterEventType.STEP_START, dg.DagsterEventType.STEP_RESTARTED}


def explain_lost_lock(
    process: ProcessIdentity | None, *, begun: datetime | None = None, postgres_started: datetime | None = None
) -> str:
    """Return why a run holds no lock in Postgres any more, as far as this process can know.

    ``process`` executed the run, which began at ``begun``.
    """
    restarted = begun is not None and postgres_started is not None and postgres_started > begun
    outage = f" Postgres was restarted at {postgres_started:%Y-%m-%d %H:%M:%S %Z} while it worked." if restarted else ""
    if process is None:
        return (
            "The process of this run no longer holds its lock in Postgres: it was killed or crashed before it could "
            f"say where it runs, or it lost its connection.{outage} {AGAIN}."
        )
    alive = exists(process)
    me = read_identity()
    if alive:
        return (
            f"The run has lost its connection to Postgres, and with it the lock that shows that it is alive; its "
            f"process ({process}) still runs and ends at its next statement.{outage} See the log of Postgres and the "
            f"network. {AGAIN}."
        )
    subject = f"The process of this run ({process})"
    if alive is None and process.host == me.host and process.boot != me.boot:
        return f"{subject} has ended, because the machine was restarted. {AGAIN}."
    if alive is None and process.boot != me.boot:
        return (
            f"{subject} no longer holds its lock in Postgres: it was killed or crashed, its machine or container "
            f"stopped, or its connection to Postgres broke.{outage} Look there for the reason (`journalctl -k`, "
            f"`docker inspect`, `kubectl describe pod`). {AGAIN}."
        )
    if outage:
        return f"{subject} has ended and could not say why, because its connection to Postgres broke.{outage} {AGAIN}."
    return f"{subject} has ended without a word{_explain_end(process, me)} {AGAIN}."


def _explain_end(process: ProcessIdentity, me: ProcessIdentity) -> str:
    """Return what the counters of the out-of-memory killer say about a process of this machine."""
    before, after = process.kills, me.kills
    # The counter of another control group says nothing about the one of the process.
    if process.group_path != me.group_path:
        after = type(after)(after.machine, None)
    match compare_kills(before, after):
        case "none":
            return (
                ": it was killed by signal 9 (SIGKILL) or another signal, or it crashed. It was not the kernel's "
                "out-of-memory killer, whose counter is the same as before. See the log of what runs it (systemd, "
                "Docker, Kubernetes) and the kernel's (`journalctl -k`)."
            )
        case "unknown":
            return (
                ": it was killed by a signal, or it crashed. If the kernel's log (`journalctl -k`) names it, "
                f"{MEMORY_ADVICE}."
            )
        case where:
            counter = "its control group" if where == "group" else "this machine"
            return (
                f", and the kernel's out-of-memory killer has killed a process of {counter} since the run began "
                f"(`journalctl -k` names it): {MEMORY_ADVICE}."
            )


def explain_failure(instance: dg.DagsterInstance, run: dg.DagsterRun, message: str | None, *, begins: bool) -> str:
    """Return why a run is marked as failed, from what Dagster says about it and has recorded.

    ``message`` is Dagster's, or None if it gives none. ``begins`` is whether the run has begun in time.
    """
    if not begins:
        return (
            f"No process began this run within {instance.run_monitoring_start_timeout_seconds} s: the launch failed, "
            "or its process ended before the first step. See the log of the code server, the worker or the pod, then "
            f"execute the run again.{_quote(message)}"
        )
    if message is None:
        return _explain_last_event(instance, run)
    if (pod := _POD_EXIT.search(message)) is not None:
        ended = f"{name_exit(int(pod['code']))} ({pod['reason']})"
        if pod["reason"] == "OOMKilled":
            ended += f", which means more memory than its limit: {MEMORY_ADVICE}"
        return f"The container of this run {ended}. {AGAIN}.{_quote(message)}"
    if (health := _HEALTH.search(message)) is not None and AGAIN in health["told"]:
        return health["told"]
    return message


def _explain_last_event(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    event = _find_last_engine_event(instance, run.run_id)
    text = (event.message if event else None) or ""
    if (code := read_exit_code(text)) is not None:
        process = find_process(instance, run.run_id)
        who = f"The process of this run ({process})" if process else "The process of this run"
        # The counters of another machine say nothing about this one.
        before = process.kills if process and process.boot == read_identity().boot else None
        return f"{who} {describe_exit(code, before=before)}. {AGAIN}."
    data = event.event_specific_data if event else None
    error = data.error if isinstance(data, EngineEventData) else None
    if error is not None and error.cls_name in _LOST_STORAGE:
        return f"Dagster lost its connection to Postgres ({error.cls_name}): check that it runs. {AGAIN}."
    if error is not None and run.status is dg.DagsterRunStatus.STARTED:
        return f"An error of Dagster ended the run ({error.cls_name}; the event before this one has it). {AGAIN}."
    if error is not None:
        return (
            f"The run could not be started ({error.cls_name}; the event before this one has the details): check that "
            "the code server and the launcher can be reached, then execute the run again."
        )
    return f"The run was marked as failed by another process, which gave no reason. {AGAIN}."


def read_exit_code(text: str) -> int | None:
    """Return the exit code in Dagster's message about a process that ended, negative for a signal; None without one."""
    if (match := _SIGNAL.search(text)) is not None:
        return -int(match[1])
    match = _EXIT_CODE.search(text)
    return int(match[1]) if match else None


def _find_last_engine_event(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterEvent | None:
    records = instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.ENGINE_EVENT, limit=1, ascending=False
    ).records
    return records[0].event_log_entry.dagster_event if records else None


def explain_crashed_step(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """Return why the child process of a step ended, from the event before the failure; None if that names no code."""
    event = _find_last_engine_event(instance, run_id)
    code = read_exit_code((event.message if event else None) or "")
    if code is None:
        return None
    process = find_process(instance, run_id)
    return f"The process of this step {describe_exit(code, before=process.kills if process else None)}. {AGAIN}."


def build_step_failure(reason: str) -> StepFailureData:
    """Return the data of a failed step that shows ``reason`` as its error in the UI."""
    return StepFailureData(  # type: ignore[no-untyped-call]
        error=SerializableErrorInfo(reason, [], _PROCESS_ENDED),
        user_failure_data=UserFailureData(  # type: ignore[no-untyped-call]
            label="intentional-failure", description=reason
        ),
    )


def fail_open_steps(instance: dg.DagsterInstance, run: dg.DagsterRun, reason: str) -> None:
    """Add a failure with a reason to each step of a run that has begun and not ended."""
    begun: dict[str, dg.DagsterEvent] = {}
    for record in instance.all_logs(run.run_id, of_type=_STEP_EVENTS):
        event = record.dagster_event
        if event is None or event.step_key is None:
            continue
        if event.event_type in _STEP_BEGINS:
            begun[event.step_key] = event
        else:
            begun.pop(event.step_key, None)
    for event in begun.values():
        failure = dg.DagsterEvent(
            event_type_value=dg.DagsterEventType.STEP_FAILURE.value,
            job_name=event.job_name,
            step_handle=event.step_handle,
            node_handle=event.node_handle,
            step_kind_value=event.step_kind_value,
            logging_tags=event.logging_tags,
            event_specific_data=build_step_failure(reason),
            message=reason,
        )
        instance.report_dagster_event(failure, run.run_id, log_level=logging.ERROR)


def complete_failure(instance: dg.DagsterInstance, run: dg.DagsterRun, message: str | None) -> str:
    """Return why a run has failed, and add it to the run if its failure, whose message is given, does not say so.

    With a ``dagster.yaml`` that does not name the project's instance, Dagster's own processes give no reason.
    """
    reason = explain_failure(instance, run, None if message == _NO_REASON else message, begins=True)
    if reason != message:
        instance.report_engine_event(reason, run)
    fail_open_steps(instance, run, reason)
    return reason


def read_reason(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """Return why a run failed, without patient data: the reasons of its failed steps, otherwise that of the run."""
    failures = [
        event
        for record in instance.all_logs(
            run_id, of_type={dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE}
        )
        if (event := record.dagster_event) is not None
    ]
    steps = [_read_step_reason(event) for event in failures if event.is_step_failure]
    reasons = list(dict.fromkeys(reason for reason in steps if reason))
    ends = [event.message for event in failures if event.is_run_failure and event.message]
    return "; ".join(reasons) or (ends[-1] if ends else None)


def read_process_end(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """Return why the process of a step ended, if an event of its run says so already."""
    for record in reversed(instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE)):
        event = record.dagster_event
        error = event.step_failure_data.error if event else None
        if event is not None and error is not None and error.cls_name == _PROCESS_ENDED:
            return _read_step_reason(event)
    return None


def _read_step_reason(event: dg.DagsterEvent) -> str | None:
    data = event.step_failure_data.user_failure_data
    return data.description if data else None


def _quote(message: str | None) -> str:
    return f"\nDagster says: {message}" if message else ""
