"""The recorder of loads, as the process that executes them sees it."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, active_count
from typing import IO

from fhir_assets.errors import FhirAssetsError, PermanentError, WorkerLost
from fhir_assets.foreign_errors import was_interrupted
from fhir_assets.ingestion.outcome import Outcome
from fhir_assets.ingestion.recorder import Answer, serve
from fhir_assets.ingestion.relay import Ended, LoadRequest, Message
from fhir_assets.process_ends import describe_exit, read_memory_kills
from fhir_assets.steps.records import describe_error

_SECONDS_TO_STOP = 60.0
"""The time that an interrupted recorder may take to end its run."""


@dataclass(frozen=True, slots=True)
class _Child:
    """A process in a session of its own, so that Ctrl-C reaches only its parent."""

    messages: IO[bytes]
    answers: IO[bytes]
    pid: int
    wait: Callable[[], int]
    """Wait for its end and return its exit code, negative for a signal."""


class RecorderProcess:
    """A recorder, and the messages to it.

    Create it before this process opens a connection or starts a thread: it is then forked, which saves its imports.
    Otherwise, it is started by the first load. ``close`` it, so that it ends.
    """

    def __init__(self) -> None:
        self._kills_before = read_memory_kills()
        self._child = _fork() if sys.platform == "linux" and active_count() == 1 else None
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        self._reader: Thread | None = None
        self._answer: Answer | None = None
        self._executes_itself = False

    def begin(self, request: LoadRequest) -> None:
        """Let the recorder begin the run of a load."""
        if self._child is None:
            self._child = _spawn()
        if self._reader is None:
            # It reads nothing until it has imported Dagster.
            Thread(target=self._write, args=(self._child.messages,), name="recorder-messages", daemon=True).start()
        self._answer = None
        self._executes_itself = False
        self._reader = Thread(target=self._read, args=(self._child.answers,), name="recorder-answer", daemon=True)
        self._reader.start()
        self.send(request)

    def send(self, message: Message) -> None:
        """Send a message, without waiting until the recorder has read it."""
        self._messages.put(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    @property
    def has_ended_run(self) -> bool:
        """Whether the recorder has ended the run, or was killed."""
        assert self._reader is not None
        return not self._reader.is_alive()

    def finish(self) -> Outcome:
        """Wait until the run is recorded, and return its outcome. The results of all steps must be sent.

        Raises the error of Dagster's storage or of the settings that ended the run, or WorkerLost if the recorder was
        killed.
        """
        assert self._reader is not None
        self._executes_itself = True
        self._reader.join()
        return self._get_outcome()

    def end_run(self, error: BaseException, reason: str) -> bool:
        """Tell the recorder that no further step will end, and wait until it has ended the run.

        Return False if it has not: Dagster does not know how the run has ended, if it knows the run.
        """
        assert self._child is not None
        assert self._reader is not None
        interrupted = was_interrupted(error)
        if interrupted and self._executes_itself:
            self._kill(signal.SIGTERM)  # It executes the steps after the layers.
        elif not self.has_ended_run:
            self.send(Ended(reason, interrupted))
        self._reader.join(_SECONDS_TO_STOP)
        if self._reader.is_alive():
            self._kill(signal.SIGKILL)  # For example, it waits for a slot of a pool of Dagster.
        return self._answer is not None

    def close(self, *, wait: bool) -> None:
        """Close the pipes. A recorder that is in a load ends its run, one that is not ends; ``wait`` until it has."""
        if self._child is None:
            return
        if self._reader is None:
            self._child.messages.close()
        else:
            self._messages.put(None)
        if wait:
            self._child.wait()

    def _write(self, pipe: IO[bytes]) -> None:
        with suppress(OSError), pipe:
            while (message := self._messages.get()) is not None:
                pipe.write(message)
                pipe.flush()

    def _read(self, pipe: IO[bytes]) -> None:
        try:
            self._answer = pickle.load(pipe)
        except (OSError, EOFError):
            pass  # It was killed.
        except Exception as error:
            self._answer = describe_error(error)

    def _kill(self, number: signal.Signals) -> None:
        assert self._child is not None
        with suppress(ProcessLookupError):
            os.kill(self._child.pid, number)

    def _get_outcome(self) -> Outcome:
        match self._answer:
            case Outcome() as outcome:
                return outcome
            case FhirAssetsError() as error:
                raise error
            case str() as defect:
                raise PermanentError(f"Dagster could not record the load: {defect}. This is a defect: please report it")
        assert self._child is not None
        ended = describe_exit(self._child.wait(), before=self._kills_before)
        raise WorkerLost(
            f"the process that records the load in Dagster {ended}. What was loaded until then is in the tables: run "
            "the same command again"
        )


def _fork() -> _Child:
    read_messages, write_messages = os.pipe()
    read_answers, write_answers = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(write_messages)
        os.close(read_answers)
        os.setsid()
        serve(os.fdopen(read_messages, "rb"), os.fdopen(write_answers, "wb"))
    os.close(read_messages)
    os.close(write_answers)

    def wait() -> int:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return _Child(os.fdopen(write_messages, "wb"), os.fdopen(read_answers, "rb"), pid, wait)


def _spawn() -> _Child:
    process = subprocess.Popen(
        [sys.executable, "-m", "fhir_assets.ingestion.recorder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    return _Child(process.stdin, process.stdout, process.pid, process.wait)
