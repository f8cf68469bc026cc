"""Dead letters on their way to the database."""

from collections.abc import Callable, Sequence

from fhir_assets.warehouse.ops.dead_letters import DeadLetter

DEAD_LETTERS_AT_ONCE = 1000
"""How many dead letters are held before they are written."""

WriteDeadLetters = Callable[[Sequence[DeadLetter]], None]
"""Writes dead letters; what it was given is safe when it returns."""


class DeadLetterBuffer:
    """Collects dead letters and hands them on by the thousand."""

    def __init__(self, reject: WriteDeadLetters) -> None:
        self._reject = reject
        self._letters: list[DeadLetter] = []

    def add(self, letter: DeadLetter) -> None:
        """Take one."""
        self._letters.append(letter)
        if len(self._letters) >= DEAD_LETTERS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Hand on what is held."""
        if self._letters:
            self._reject(self._letters)
            self._letters = []
