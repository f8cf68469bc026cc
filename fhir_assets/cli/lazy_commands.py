"""Commands whose modules are imported when they are called, so that a command imports only what it needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group


@dataclass(frozen=True)
class CommandSource:
    """Where a command is defined, and its help text in the list of commands.

    ``attribute`` of ``module`` is the function of a command, or the ``typer.Typer`` of a group of commands.
    """

    module: str
    attribute: str
    help: str


class LazyCommand(TyperCommand):
    """Stands for a command until it is called: it has a name and a help text, but neither options nor arguments."""

    def __init__(self, name: str, source: CommandSource) -> None:
        super().__init__(name, help=source.help)
        self._source = source

    def load(self) -> Any:
        """Import the module of the command and return the command."""
        return _load(self.name or "", self._source)

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse the arguments of the command itself."""
        return self.load().make_context(*args, **options)

    @property
    def commands(self) -> Mapping[str, Any]:
        """The commands of a group. Raises AttributeError if the command is not a group."""
        commands: Mapping[str, Any] = self.load().commands
        return commands


def build_group(sources: Mapping[str, CommandSource]) -> type[TyperGroup]:
    """Return a class of command groups. A group has the commands that are registered with it, and then ``sources``."""

    class LazyGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            for name, source in sources.items():
                self.add_command(LazyCommand(name, source))

    return LazyGroup


@cache
def _load(name: str, source: CommandSource) -> Any:
    target = getattr(import_module(source.module), source.attribute)
    if isinstance(target, typer.Typer):
        command = get_group(target)
        command.name = name
        return command
    app = typer.Typer(add_completion=False)
    app.command(name)(target)
    return get_command(app)
