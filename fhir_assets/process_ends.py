"""Why a process ended: sentences about exit codes, signals and the kernel's out-of-memory killer.

A parent knows the exit code or the signal of its child. Every other process knows only what the kernel tells: whether a
process still exists, whether the machine was restarted, and how many processes the out-of-memory killer has ended.
"""

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MEMORY_ADVICE = (
    "give it more memory, or let it need less with lower FHIR_WORKERS, FHIR_MAX_RUNS, FHIR_WINDOWS_PER_RUN or "
    "VALIDATION_MAX_BYTES"
)
OUT_OF_MEMORY_EXIT_CODE = 71
"""The exit code of a worker process that got no memory and could not answer (EX_OSERR)."""

_MACHINE_KILLS = Path("/proc/vmstat")
_GROUP_FILES = (
    ("", "/sys/fs/cgroup{path}/memory.events"),
    ("memory", "/sys/fs/cgroup/memory{path}/memory.oom_control"),
    ("memory", "/sys/fs/cgroup/memory/memory.oom_control"),
)
_SHELL_SIGNALS = 128
"""A shell or a container that ends by signal N has the exit code 128 + N."""

_STOPPED = "an operator, or the system that runs it (systemd, Docker, Kubernetes), stopped it: see its log"
_ADVICE = {
    signal.SIGTERM: _STOPPED,
    signal.SIGINT: "somebody pressed Ctrl-C, or stopped the command that started it",
    signal.SIGHUP: "its terminal was closed: start it as a service, or with nohup",
    signal.SIGXCPU: "it used more processor time than allowed: raise the limit (ulimit -t)",
    signal.SIGXFSZ: "it wrote a larger file than allowed: raise the limit (ulimit -f)",
}
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGSYS}


@dataclass(frozen=True, slots=True)
class MemoryKills:
    """How many processes the kernel's out-of-memory killer has ended; None if the kernel does not say.

    ``machine`` counts since the start of the machine, ``group`` in the control group (the container) of a process.
    """

    machine: int | None = None
    group: int | None = None


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Which process it is, on which machine, and what the out-of-memory killer had done when it was asked.

    ``boot`` changes when the machine starts, ``namespace`` is the same for processes that see each other, and
    ``started`` tells two processes with the same number apart.
    """

    host: str
    pid: int
    boot: str = ""
    namespace: int = 0
    started: str = ""
    group_path: str = ""
    kills: MemoryKills = MemoryKills()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def read_identity() -> ProcessIdentity:
    """Return the identity of the calling process. What the operating system does not tell is empty."""
    return ProcessIdentity(
        host=socket.gethostname(),
        pid=os.getpid(),
        boot=_read(Path("/proc/sys/kernel/random/boot_id")).strip(),
        namespace=_read_namespace(),
        started=_read_start(os.getpid()),
        group_path=_read(Path("/proc/self/cgroup")),
        kills=read_memory_kills(),
    )


def read_memory_kills() -> MemoryKills:
    """Return the current counters of the out-of-memory killer for this machine and this control group."""
    group = None
    paths = {
        parts[1]: parts[2] for line in _read(Path("/proc/self/cgroup")).splitlines() if (parts := line.split(":", 2))
    }
    for controller, pattern in _GROUP_FILES:
        if group is None and controller in paths:
            group = _read_count(Path(pattern.format(path=paths[controller].rstrip("/"))))
    return MemoryKills(_read_count(_MACHINE_KILLS), group)


def compare_kills(before: MemoryKills, after: MemoryKills) -> Literal["group", "machine", "none", "unknown"]:
    """Return where the out-of-memory killer has ended a process between two readings on one machine."""
    if before.group is not None and after.group is not None and after.group > before.group:
        return "group"
    if before.machine is None or after.machine is None:
        return "unknown"
    return "machine" if after.machine > before.machine else "none"


def name_exit(code: int) -> str:
    """Return what ended a child process, from its exit code: negative for a signal."""
    number = -code if code < 0 else code - _SHELL_SIGNALS
    name = _name_signal(number)
    if name is None:
        return f"was ended by signal {number}" if code < 0 else f"ended with exit code {code}"
    by_code = "" if code < 0 else f"exit code {code}, which is "
    verb = "was killed by" if number == signal.SIGKILL else "crashed with" if number in _CRASHES else "was ended by"
    return f"{verb} {by_code}signal {number} ({name})"


def describe_exit(code: int, *, before: MemoryKills | None = None) -> str:
    """Return what ended a child process, and why or what to do next, as far as that can be known.

    ``before`` are the counters of the out-of-memory killer when the child began; without them they decide nothing.
    """
    number = -code if code < 0 else code - _SHELL_SIGNALS
    if number == signal.SIGKILL:
        return f"{name_exit(code)}{_describe_kill(before)}"
    return f"{name_exit(code)}{_describe_other_exit(code, number)}"


def _describe_other_exit(code: int, number: int) -> str:
    if code == OUT_OF_MEMORY_EXIT_CODE:
        return f", because it got no memory: {MEMORY_ADVICE}"
    if _name_signal(number) is None:
        told = ", although its work was not done" if code == 0 else " of its own"
        return f"{told}: see the log of the process that started it"
    if number in _CRASHES:
        return (
            ": a library in C failed. Run it again, and report it with the lines about it in the kernel's log "
            "(`journalctl -k`)"
        )
    return f": {_ADVICE.get(signal.Signals(number), _STOPPED)}"


def _describe_kill(before: MemoryKills | None) -> str:
    where = compare_kills(before, read_memory_kills()) if before else "unknown"
    if where == "none":
        return (
            ", but not by the kernel's out-of-memory killer, whose counter is the same as before: an operator, or the "
            "system that runs it (systemd, Docker, Kubernetes), killed it: see its log"
        )
    if where == "unknown":
        return (
            ": by the kernel's out-of-memory killer if the kernel's log (`journalctl -k`) names it, otherwise by an "
            f"operator or a service. If it was the memory, {MEMORY_ADVICE}"
        )
    counter = "its control group" if where == "group" else "this machine"
    return f" by the kernel's out-of-memory killer, whose counter for {counter} has risen: {MEMORY_ADVICE}"


def exists(process: ProcessIdentity) -> bool | None:
    """Return whether a process still runs; None if this process cannot see it."""
    me = read_identity()
    if not process.boot or (process.boot, process.namespace) != (me.boot, me.namespace):
        return None
    return _read_start(process.pid) == process.started


def _name_signal(number: int) -> str | None:
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def _read_start(pid: int) -> str:
    """Return when a process began, in ticks since the start of the machine; empty if it has ended."""
    # The name of the process, in brackets, may contain spaces and brackets.
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else ""


def _read_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _read_count(path: Path) -> int | None:
    for line in _read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.isdigit():
            return int(value)
    return None


def _read(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text()
    return ""
