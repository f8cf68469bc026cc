"""Loads whose steps this process executes without Dagster, while a recorder records them in Dagster."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from threading import current_thread, main_thread
from uuid import uuid4

from fhir_assets.catalog import BY_NAME
from fhir_assets.deployment.source import open_source
from fhir_assets.deployment.store import build_store
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.foreign_errors import translate_error, was_interrupted
from fhir_assets.ingestion.outcome import LoadListener, Outcome
from fhir_assets.ingestion.recorder_process import RecorderProcess
from fhir_assets.ingestion.relay import Layer, LoadRequest, Progress, StepEnd, StepResult
from fhir_assets.pipeline.refresh import Refresh
from fhir_assets.process_ends import read_identity
from fhir_assets.settings import Settings, SourceKind
from fhir_assets.steps.layers import LayerSteps, LocalSteps
from fhir_assets.steps.progress import ProgressRelay
from fhir_assets.steps.records import StepFailed, describe_error, describe_interruption
from fhir_assets.steps.run_context import RunContext
from fhir_assets.windows import WindowRange


class RecordedLoads:
    """Executes the steps of loads in this process, while ``recorder`` records each as a run of ``incremental_load``."""

    def __init__(self, settings: Settings, recorder: RecorderProcess) -> None:
        self._settings = settings
        self._recorder = recorder
        self._warehouse = warehouse = Warehouse(settings)
        store = build_store(settings)
        self._views = build_views(settings).views
        progress = ProgressRelay()
        source = cache(
            lambda: open_source(settings, store=store, warehouse=warehouse, on_progress=progress, persistent=True)
        )
        self._steps = LocalSteps(settings, store, warehouse, self._views, source, progress)

    def count_steps(self) -> int:
        """Return the number of steps of a load."""
        types = self._settings.fhir_resource_types
        fetches = 1 if self._fetches_in_one_pass else len(types)
        return fetches + len(types) + sum(bool(self._list_views(name)) for name in types)

    def load_due(
        self,
        windows: WindowRange,
        *,
        refresh: Refresh,
        triggered_by: str,
        resource_types: Sequence[str],
        listener: LoadListener,
    ) -> Outcome:
        """Load the types of the windows in one run.

        Raises DatabaseUnavailable if the database is lost, and WorkerLost if the run cannot be recorded.
        """
        scheme = self._settings.window_scheme
        first = windows.windows[0] == scheme.window_at(scheme.start)
        covered = WindowRange(windows.windows, from_first=first)
        run = RunContext(str(uuid4()), covered, refresh, triggered_by, datetime.now(UTC))
        request = LoadRequest(
            self._settings, run.run_id, windows, refresh, triggered_by, tuple(resource_types), read_identity()
        )
        with self._warehouse.hold_run(run.run_id), _sigterm_interrupts():
            self._recorder.begin(request)
            try:
                self._execute(_Load(self._steps, run, self._recorder, listener), resource_types)
                return self._recorder.finish()
            except BaseException as error:
                reason = describe_interruption(run) if was_interrupted(error) else describe_error(error)
                if not self._recorder.end_run(error, reason):
                    _fail_run(self._settings, run.run_id, reason)
                raise

    def _execute(self, load: "_Load", resource_types: Sequence[str]) -> None:
        """Execute the steps of a load in the order in which Dagster records them.

        A type whose step fails is not processed further. Consents are loaded first, so that they apply to the resources
        of the other types.
        """
        ordered = sorted(resource_types, key=lambda name: BY_NAME[name].key)
        fetched = set(ordered) if self._fetches_in_one_pass and load.fetch(ordered) else set()
        for first in (True, False):
            names = [name for name in ordered if (name == "Consent") is first]
            if not self._fetches_in_one_pass:
                fetched.update([name for name in names if load.fetch([name])])
            validated = [name for name in names if name in fetched and load.validate(name)]
            for name in validated:
                if views := self._list_views(name):
                    load.load(name, views)

    @property
    def _fetches_in_one_pass(self) -> bool:
        """Whether one step fetches all types. A source that is searched by type has a step for each."""
        return self._settings.fhir_source is not SourceKind.SEARCH

    def _list_views(self, resource_type: str) -> list[str]:
        return [view.name for view in self._views if view.resource_type == resource_type]


@dataclass(frozen=True, slots=True)
class _Load:
    """Executes the steps of one run and sends their results.

    The methods return whether the step has succeeded. If the recorder has ended the run, they do nothing.
    """

    steps: LayerSteps
    run: RunContext
    recorder: RecorderProcess
    listener: LoadListener

    def fetch(self, resource_types: Sequence[str]) -> bool:
        return self._execute("raw", resource_types, lambda run: self.steps.fetch(run, resource_types, self._show))

    def validate(self, resource_type: str) -> bool:
        return self._execute(
            "validated", [resource_type], lambda run: {resource_type: self.steps.validate(run, resource_type)}
        )

    def load(self, resource_type: str, view_names: Sequence[str]) -> bool:
        return self._execute(
            "normalized", [resource_type], lambda run: {resource_type: self.steps.load(run, resource_type, view_names)}
        )

    def _execute(
        self, layer: Layer, names: Sequence[str], step: Callable[[RunContext], Mapping[str, StepResult]]
    ) -> bool:
        if self.recorder.has_ended_run:
            return False
        self.listener.begin_step(f"{layer} {names[0]}" if len(names) == 1 else layer)
        results: Mapping[str, StepResult | StepFailed]
        try:
            results = step(replace(self.run, now=datetime.now(UTC)))
            succeeded = True
        except StepFailed as failure:
            results = dict.fromkeys(names, failure)
            succeeded = False
        for name in names:
            self.recorder.send(StepEnd((layer, name), results[name]))
        self.listener.end_step()
        return succeeded

    def _show(self, text: str) -> None:
        self.recorder.send(Progress(text))
        self.listener.show(text)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM interrupt the ``with`` block as Ctrl-C does, so that the run says that it was stopped."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail_run(settings: Settings, run_id: str, reason: str) -> None:
    """Mark a run as failed whose recorder has ended, if it has recorded that the run began.

    If Dagster's storage cannot be reached, the next load does so.
    """
    from fhir_assets.orchestration.dead_runs import fail_run  # It imports Dagster.
    from fhir_assets.orchestration.instance import config

    try:
        instance = config.open_instance(settings)
        if (run := instance.get_run_by_id(run_id)) is not None and not run.is_finished:
            fail_run(instance, run, reason)
    except Exception as error:
        if translate_error(error) is None:
            raise
