"""A buffer of dead letters, so that a step writes them to the database in batches."""

from collections.abc import Callable, Sequence

from fhir_assets.warehouse.ops.dead_letters import DeadLetter

DEAD_LETTERS_PER_BATCH = 1000
"""How many dead letters are held in memory before they are written."""

WriteDeadLetters = Callable[[Sequence[DeadLetter]], None]
"""Writes dead letters to the database and commits them before it returns."""


class DeadLetterBuffer:
    """Collects dead letters and passes them to ``write`` in batches of DEAD_LETTERS_PER_BATCH."""

    def __init__(self, write: WriteDeadLetters) -> None:
        self._write = write
        self._dead_letters: list[DeadLetter] = []

    def add(self, dead_letter: DeadLetter) -> None:
        """Add one dead letter; a full buffer is written."""
        self._dead_letters.append(dead_letter)
        if len(self._dead_letters) >= DEAD_LETTERS_PER_BATCH:
            self.flush()

    def flush(self) -> None:
        """Write the dead letters in the buffer."""
        if self._dead_letters:
            self._write(self._dead_letters)
            self._dead_letters = []
