"""How an upload shows itself: a bar a file on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
from typing import Self

from rich import progress

from fhir_assets.cli.output import console
from fhir_assets.delivery.upload.journal import BatchKey, BatchResult

_BARS = 10
"""So many bars of finished files stay on the screen."""


class Progress:
    """A line a batch, and on a terminal a bar for each file of the type whose turn it is."""

    def __init__(self, steps: Mapping[str, Mapping[str, int]]) -> None:
        self._steps = list(steps)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[failed]} failed"),
            progress.TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, progress.TaskID] = {}
        self._failed: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        self._files: Mapping[str, int] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, resource_type: str, files: Mapping[str, int]) -> None:
        """Name the step, and begin a bar for each of its files."""
        for task in self._tasks.values():
            self._bars.stop_task(task)
        for old in self._bars.task_ids[: -_BARS or None]:
            self._bars.remove_task(old)
        place = f"{self._steps.index(resource_type) + 1}/{len(self._steps)}"
        console.print(f"Step {place}: {resource_type}, {sum(files.values()):,} resources", markup=False)
        self._files = files
        self._failed = dict.fromkeys(files, 0)
        self._sent = dict.fromkeys(files, 0)
        self._tasks = {name: self._bars.add_task(name, total=count, failed=0) for name, count in files.items()}

    def batch(self, key: BatchKey, done: BatchResult, size: int) -> None:
        """A line for the batch, and its file's bar moves on."""
        if key.file in self._tasks:
            self._sent[key.file] += size
            self._failed[key.file] += len(done.failed)
            self._bars.update(self._tasks[key.file], advance=size, failed=self._failed[key.file])
            where = f"{key.file} {self._sent[key.file]:,}/{self._files[key.file]:,}"
        else:
            where = f"{key.resource_type} again"
        if not done.seconds:
            return
        unchanged = f"{done.unchanged} unchanged, " if done.unchanged else ""
        held = f", {len(done.held)} to try again" if done.held else ""
        console.print(
            f"  {where}: {done.created} created, {done.updated} updated, {unchanged}{len(done.failed)} failed{held},"
            f" {done.seconds:.2f} s",
            markup=False,
            soft_wrap=True,
        )

    def again(self, what: str, count: int) -> None:
        """Say what is tried again."""
        console.print(f"Again, {what}: {count:,} resources", markup=False)
