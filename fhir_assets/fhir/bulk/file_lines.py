"""The lines of one downloaded file, and the check that a second download begins with the same lines."""

from collections.abc import Iterable, Iterator

import orjson
from isal import isal_zlib

from fhir_assets.errors import NotFhir, ServerUnavailable
from fhir_assets.fhir.lines import DamagedFile
from fhir_assets.retries import TransientFailure

_BOM = b"\xef\xbb\xbf"
LONG_LINE = b"a line longer than the limit for one resource"
"""The line that ``split_file`` returns for a line that is too long. It is not JSON, and becomes a dead letter."""
_CUT_OFF = "the server cuts it off: run again to request a new export"


class FileChanged(ServerUnavailable):
    """The download of a file was interrupted, and a second download does not begin with the same lines.

    The lines that have been returned cannot be used: the file must be read again from its start.
    """

    def __init__(self) -> None:
        super().__init__(
            "a file of the export broke off, and the server gives its lines in another order each time it is "
            "requested: the next run requests it again; ask the server's administrator if it happens again"
        )


class ReturnedLines:
    """The lines of a file that have been returned: their number and a running checksum."""

    def __init__(self) -> None:
        self.count = 0
        self._checksum = 0

    def add(self, lines: list[bytes]) -> None:
        """Add returned lines."""
        self.count += len(lines)
        self._checksum = isal_zlib.crc32(b"\n".join(lines) + b"\n", self._checksum)

    def skip_in(self, batches: Iterable[list[bytes]]) -> Iterator[list[bytes]]:
        """Yield the lines of another download of the file after those that have been returned.

        Raises FileChanged if it does not begin with the same lines.
        """
        remaining, expected = self.count, self._checksum
        checksum = 0
        for batch in batches:
            if remaining:
                skipped = batch[:remaining]
                remaining -= len(skipped)
                checksum = isal_zlib.crc32(b"\n".join(skipped) + b"\n", checksum)
                if not remaining and checksum != expected:
                    raise FileChanged
                batch = batch[len(skipped) :]
            if batch:
                yield batch
        if remaining:
            raise FileChanged


def split_file(chunks: Iterable[bytes], limit: int) -> Iterator[list[bytes]]:
    """Split the content of a file into lines, in batches, without blank lines and without a byte order mark.

    A line of more than ``limit`` bytes is returned as LONG_LINE, and does not need more memory. Raises TransientFailure
    if the content is HTML or XML, ends in the middle of a line, or is a damaged compressed stream.
    """
    parts: list[bytes] = []
    length = 0
    first = True
    try:
        for chunk in chunks:
            if first:
                chunk = chunk.removeprefix(_BOM)
                if chunk.lstrip().startswith(b"<"):
                    raise TransientFailure(
                        "the file is HTML or XML, not NDJSON",
                        advice="is there a proxy or a login page in front of the server's files?",
                        final=NotFhir,
                    )
                first = False
            head, *lines = chunk.split(b"\n")
            length += len(head)
            if length <= limit:
                parts.append(head)
            else:
                parts.clear()
            if lines:
                first_line = b"".join(parts) if length <= limit else LONG_LINE
                if len(chunk) > limit:
                    lines[:-1] = [line if len(line) <= limit else LONG_LINE for line in lines[:-1]]
                complete = [line for line in (first_line, *lines[:-1]) if line.strip()]
                parts, length = [lines[-1]], len(lines[-1])
                if complete:
                    yield complete
    except DamagedFile as error:
        raise TransientFailure(str(error), advice=_CUT_OFF, final=NotFhir) from None
    if length > limit:
        yield [LONG_LINE]
        return
    rest = b"".join(parts)
    if rest.strip():
        if not _is_json(rest):
            raise TransientFailure("the file ends in the middle of a line", advice=_CUT_OFF, final=NotFhir)
        yield [rest]


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True
