"""The recorder: a process that records loads in Dagster, while the process that started it executes their steps.

An import of Dagster and of the definitions takes longer than a small load, so that the load does not wait for it.
"""

import os
import pickle
import signal
import sys
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from time import sleep
from typing import Any, BinaryIO, NoReturn

from fhir_assets.deployment.audit_marker import finish_marks
from fhir_assets.errors import FhirAssetsError
from fhir_assets.file_modes import restrict_umask
from fhir_assets.foreign_errors import translate_error
from fhir_assets.ingestion.outcome import Outcome
from fhir_assets.ingestion.relay import LoadRequest, Message, RelayedSteps
from fhir_assets.pipeline.workers.gc_tuning import infrequent_gc
from fhir_assets.steps.records import describe_error

Answer = Outcome | FhirAssetsError | str
"""The outcome of a load, or why Dagster could not record it: an error, or the description of a defect."""

_SECONDS_TO_NOTICE = 2.0
"""The recorder waits so long for another process to notice that its parent has ended, for example the next command."""


def serve(messages: BinaryIO, answers: BinaryIO) -> NoReturn:
    """Record each load that the messages describe, and answer it with its Answer. End this process after the last one.

    Ctrl-C is left to the parent, which says when to stop. The output of libraries is discarded, because their stack
    traces may quote a resource.
    """
    restrict_umask()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    code = 1
    with infrequent_gc():
        try:
            recorder = _Recorder(messages)
            while (request := recorder.receive_request()) is not None:
                pickle.dump(recorder.record(request), answers)
                answers.flush()
            finish_marks()
            code = 0
        finally:
            os._exit(code)


class _Recorder:
    """Records loads. Dagster is imported for the first of them.

    A thread reads the messages, so that the end of the parent is noticed whatever Dagster waits for.
    """

    def __init__(self, messages: BinaryIO) -> None:
        self._messages: SimpleQueue[Message | None] = SimpleQueue()
        self._is_recording = False
        self._steps = RelayedSteps(self._receive)
        self._ingestion: Any = None
        Thread(target=self._read, args=(messages,), name="recorder-messages", daemon=True).start()

    def receive_request(self) -> LoadRequest | None:
        """Wait for the next request; return None after the last one. What the last run did not take is skipped."""
        while (message := self._messages.get()) is not None:
            if isinstance(message, LoadRequest):
                return message
        return None

    def record(self, request: LoadRequest) -> Answer:
        """Record a load."""
        self._is_recording = True
        self._steps.begin()
        try:
            from fhir_assets.ingestion.runs import Ingestion, open_ingestion

            if self._ingestion is None:
                self._ingestion = open_ingestion(request.settings, steps=self._steps, process=request.process)
            ingestion: Ingestion = self._ingestion
            return ingestion.record(request)
        except BaseException as error:
            return translate_error(error) or describe_error(error)
        finally:
            self._is_recording = False

    def _receive(self) -> Message:
        message = self._messages.get()
        if message is None:
            self._end_dead_run()
        return message

    def _read(self, pipe: BinaryIO) -> None:
        with suppress(OSError, EOFError, pickle.UnpicklingError):
            while True:
                self._messages.put(pickle.load(pipe))
        if self._is_recording:
            self._end_dead_run()
        self._messages.put(None)

    def _end_dead_run(self) -> NoReturn:
        """Mark the run as failed, unless another process does so first, and end at once, as the parent has."""
        try:
            sleep(_SECONDS_TO_NOTICE)
            if self._ingestion is not None:
                self._ingestion.fail_dead_runs()
        finally:
            os._exit(1)


if __name__ == "__main__":
    serve(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
