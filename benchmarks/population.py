"""Input of any size: copies of the Synthea population with new ids, or the sandbox's population."""

import gzip
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from isal import igzip

from benchmarks.loader import observation
from benchmarks.machine import SYNTHEA
from fhir_assets.sandbox.population import Population, write_population

_BLOCK = 1000
_HEAD_OF_UUID = re.compile(rb"([0-9a-f]{4})(?=[0-9a-f]{4}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
_RESOURCES_A_PATIENT = 30
_SAMPLE_PATIENTS = 300


@contextmanager
def sample() -> Iterator[Path]:
    """Yield a folder of ``<Type>.ndjson.gz``: the shared Synthea population, or else the sandbox's population."""
    if SYNTHEA.is_dir():
        yield SYNTHEA
        return
    with tempfile.TemporaryDirectory() as folder:
        write_population(Path(folder), Population(_SAMPLE_PATIENTS))
        yield Path(folder)


def write(folder: Path, resources: int) -> int:
    """Fill a folder with ``<Type>.ndjson.gz`` of at least ``resources`` linked resources. Return their number."""
    if not SYNTHEA.is_dir():
        return write_population(folder, Population(resources // _RESOURCES_A_PATIENT)).resources.total()
    files = {path.name: gzip.decompress(path.read_bytes()).splitlines() for path in sorted(SYNTHEA.glob("*.ndjson.gz"))}
    copies = -(-resources // sum(map(len, files.values())))
    return sum(_write(folder / name, _copies(lines, copies)) for name, lines in files.items())


def write_type(path: Path, resource_type: str, count: int) -> None:
    """Write so many resources of a type to a file of NDJSON without compression: copies of the sample's."""
    with sample() as folder:
        lines = gzip.decompress((folder / f"{resource_type}.ndjson.gz").read_bytes()).splitlines()
    with path.open("wb") as file:
        for line in islice(_copies(lines, -(-count // len(lines))), count):
            file.write(line + b"\n")


def write_observations(path: Path, count: int) -> int:
    """Write blood pressures, one per second of time, to a file. Return their number."""
    return _write(path, (observation(number).body for number in range(count)))


def _copies(lines: list[bytes], copies: int) -> Iterator[bytes]:
    """Yield copies in which every UUID is replaced, equally in all resources of a copy, so that references resolve."""
    split = [_HEAD_OF_UUID.split(line) for line in lines]
    for copy in range(copies):
        for pieces in split:
            renamed = pieces.copy()
            renamed[1::2] = [b"%04x" % (int(head, 16) ^ copy) for head in pieces[1::2]]
            yield b"".join(renamed)


def _write(path: Path, lines: Iterator[bytes]) -> int:
    count = 0
    block: list[bytes] = []
    with path.open("wb") as file:
        for line in lines:
            block.append(line)
            count += 1
            if len(block) == _BLOCK:
                file.write(igzip.compress(b"\n".join([*block, b""]), 1))
                block.clear()
        file.write(igzip.compress(b"\n".join([*block, b""]) if block else b"", 1))
    return count
