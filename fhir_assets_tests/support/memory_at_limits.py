"""A process that reads one input at or beyond a limit, and prints what became of it and its memory in MiB."""

import io
import json
import resource
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import BinaryIO, cast

from fhir_assets.fhir.files import formats
from fhir_assets.fhir.files.formats import LandedContent
from fhir_assets.fhir.lines import decompress
from fhir_assets.fhir.record import RejectedInput
from fhir_assets.fhir.validation import Validator

MIB = 1 << 20
NOW = datetime(2024, 1, 5, tzinfo=UTC)


class Repeated(io.RawIOBase):
    """A stream of a text between two others, repeated, which is not in memory."""

    def __init__(self, start: bytes, unit: bytes, count: int, end: bytes = b"") -> None:
        block = unit * (MIB // len(unit))
        whole, rest = divmod(count, MIB // len(unit))
        self._parts = iter([start, *([block] * whole), unit * rest, end])
        self._part = b""

    def read(self, count: int = -1) -> bytes:
        while not self._part:
            part = next(self._parts, None)
            if part is None:
                return b""
            self._part = part
        piece, self._part = self._part[:count], self._part[count:]
        return piece


def entries(count: int) -> Repeated:
    """Return a Bundle of empty entries on one line."""
    return Repeated(b'{"resourceType":"Bundle","type":"batch","entry":[', b"{},", count, b"{}]}")


def compressed(text: bytes, size: int) -> io.BytesIO:
    """Return ``size`` MiB of a character, compressed."""
    compressor = zlib.compressobj(9, wbits=31)
    parts = [compressor.compress(text * MIB) for _ in range(size)]
    return io.BytesIO(b"".join([*parts, compressor.flush()]))


PATIENT = b'{"resourceType":"Patient","id":"a","name":['
INPUTS: dict[str, tuple[str, Callable[[], io.IOBase]]] = {
    "a Bundle on a line at the limit of values": ("x.ndjson", lambda: entries(1_900_000)),
    "a Bundle on a line beyond it": ("x.ndjson", lambda: entries(20_000_000)),
    "an entry beyond it": (
        "x.json",
        lambda: Repeated(b'{"resourceType":"Bundle","entry":[' + PATIENT, b"1,", 30_000_000, b"1]}]}"),
    ),
    "a line at the limit of bytes": (
        "x.ndjson",
        lambda: Repeated(b'{"resourceType":"Patient","id":"', b"a", 63 * MIB, b'"}'),
    ),
    "a line beyond it": ("x.ndjson", lambda: Repeated(b"", b"x", 300 * MIB)),
    "a document beyond it": ("x.json", lambda: Repeated(b'{"a":"', b"x", 300 * MIB)),
    "a row beyond it": ("x.csv", lambda: Repeated(b'mrn,"', b"x", 300 * MIB)),
    "a compressed file beyond the ratio": ("x.ndjson", lambda: compressed(b"0", 300)),
    "compressed lines beyond the ratio": ("x.ndjson", lambda: compressed(b"\n", 300)),
}


def main(name: str) -> None:
    """Read an input and print the numbers of its items by message, and the growth of the process."""
    before = _peak()
    if name == "issues at the limit of values":
        body = PATIENT + b"1," * 1_900_000 + b"1]}"
        items = Counter(str(issue.severity) for issue in Validator().check(body).issues)
    else:
        file_name, build = INPUTS[name]
        content = LandedContent("x", decompress(cast(BinaryIO, build())), NOW, 64 * MIB)
        items = Counter(
            item.message if isinstance(item, RejectedInput) else type(item).__name__
            for item in formats.read(file_name, content)
        )
    print(json.dumps({"items": items, "mib": _peak() - before}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main(sys.argv[1])
