"""Progress of an upload: a bar for each file on a terminal, otherwise a line for each batch."""

from collections.abc import Mapping
from typing import Self

from rich import progress

from fhir_assets.cli.output import console
from fhir_assets.control_characters import escape_control_characters
from fhir_assets.delivery.upload.journal import BatchKey, BatchResult

_MAX_FINISHED_BARS = 10
"""Number of bars of finished files that stay on the screen."""


class Progress:
    """Prints a line for each batch, and on a terminal a bar for each file of the current resource type."""

    def __init__(self, steps: Mapping[str, Mapping[str, int]]) -> None:
        self._steps = list(steps)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
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

    def on_step(self, resource_type: str, files: Mapping[str, int]) -> None:
        """Start the step of a resource type, with a bar for each of its files."""
        for task in self._tasks.values():
            self._bars.stop_task(task)
        for finished in self._bars.task_ids[: -_MAX_FINISHED_BARS or None]:
            self._bars.remove_task(finished)
        position = f"{self._steps.index(resource_type) + 1}/{len(self._steps)}"
        console.print(f"Step {position}: {resource_type}, {sum(files.values()):,} resources", markup=False)
        self._files = files
        self._failed = dict.fromkeys(files, 0)
        self._sent = dict.fromkeys(files, 0)
        self._tasks = {
            name: self._bars.add_task(escape_control_characters(name), total=count, failed=0)
            for name, count in files.items()
        }

    def on_batch(self, key: BatchKey, done: BatchResult, size: int) -> None:
        """Print a line for a batch of ``size`` resources, and advance the bar of its file."""
        if key.file in self._tasks:
            self._sent[key.file] += size
            self._failed[key.file] += len(done.failed)
            self._bars.update(self._tasks[key.file], advance=size, failed=self._failed[key.file])
            label = f"{key.file} {self._sent[key.file]:,}/{self._files[key.file]:,}"
        else:
            label = f"{key.resource_type}, sent again"
        if not done.seconds:
            return
        unchanged = f"{done.unchanged} unchanged, " if done.unchanged else ""
        held = f", {len(done.held)} to send again" if done.held else ""
        console.print(
            f"  {label}: {done.created} created, {done.updated} updated, {unchanged}{len(done.failed)} failed{held},"
            f" {done.seconds:.2f} s",
            markup=False,
            soft_wrap=True,
        )

    def on_retry(self, description: str, count: int) -> None:
        """Print that resources are sent again."""
        console.print(f"Sent again: {count:,} resources ({description})", markup=False)
