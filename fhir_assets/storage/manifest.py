"""The manifest of a partition: its parts, and the fetches or inputs that they were made from.

Readers access a partition only through its manifest, which is written last and atomically.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import chain, repeat

import msgspec

from fhir_assets.notices import Notice
from fhir_assets.sources import DEFAULT_SOURCE


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """A sequence of ``rows`` lines of a part that arrived at the same time."""

    rows: int
    at: datetime


def list_times(arrivals: Sequence[Arrival]) -> Iterator[datetime | None]:
    """Yield the time of arrival of each line. If there are no arrivals, yield None endlessly."""
    if not arrivals:
        return repeat(None)
    return chain.from_iterable([repeat(arrival.at, arrival.rows) for arrival in arrivals])


class Part(msgspec.Struct, frozen=True):
    """One gzip file of NDJSON with ``rows`` resources.

    ``bytes`` is the size of the lines with their line feeds, ``stored_bytes`` the size of the file. ``first`` and
    ``last`` are the least and the greatest ``lastUpdated``. ``origin`` names the file or request that the resources
    were received in (``landing:<hash>``); it is None for resources fetched from the configured source. ``arrivals`` are
    the times at which the lines arrived, in order; it is empty in the parts of releases that did not record them.
    ``dated`` is False if the ``lastUpdated`` of the lines does not count, because a client sent it or because it lies
    in the future.
    """

    name: str
    rows: int
    bytes: int
    stored_bytes: int
    first: datetime | None = None
    last: datetime | None = None
    origin: str | None = None
    arrivals: tuple[Arrival, ...] = ()
    dated: bool = True


class Receipt(msgspec.Struct, frozen=True):
    """The resources that a raw partition received from one origin other than the configured source.

    ``rows`` were written, ``rejected`` became dead letters.
    """

    origin: str
    at: datetime
    rows: int
    rejected: int


class Undated(msgspec.Struct, frozen=True):
    """The search for undated resources (without ``meta.lastUpdated``) that was made with a fetch of the window.

    ``expected`` is the number that the source declared, None if it declares none; ``found`` were returned, of which
    ``repeated`` were in the partition already and ``rejected`` became dead letters. ``missing`` were declared but not
    returned; it is None if the source neither counted nor returned them.
    """

    at: datetime
    expected: int | None
    found: int
    repeated: int
    rejected: int
    missing: int | None


class Fetch(msgspec.Struct, frozen=True):
    """One fetch of an interval of the window from the source, with its counts of resources.

    ``server_total`` is the number that the source reported, None if it reports none; ``matched`` were returned, of
    which ``repeated`` were in the partition already and ``rejected`` became dead letters. ``notices`` are those
    that the source gave during the fetch.
    """

    start: datetime | None
    end: datetime
    at: datetime
    server_total: int | None
    matched: int
    repeated: int
    rejected: int
    notices: tuple[Notice, ...] = ()
    undated: Undated | None = None

    @property
    def new(self) -> int:
        """Returned resources that the partition did not have, with those that became dead letters."""
        undated = self.undated.found - self.undated.repeated if self.undated else 0
        return self.matched - self.repeated + undated

    @property
    def dead(self) -> int:
        """Returned resources that became dead letters."""
        return self.rejected + (self.undated.rejected if self.undated else 0)

    @property
    def may_be_incomplete(self) -> bool:
        """Whether resources may be missing: the source reported an error, or another count than it returned."""
        return self.server_total not in (None, self.matched) or any(n.severity == "error" for n in self.notices)


class Fetched(msgspec.Struct, frozen=True):
    """The fetches of a raw partition. The window has been fetched up to ``until``."""

    until: datetime
    complete: bool
    fetches: tuple[Fetch, ...]
    source_state: str | None = None

    @property
    def unreturned(self) -> int | None:
        """Resources that the source declared but did not return, according to the last fetch that asked for undated
        resources.
        """
        asked = [fetch.undated for fetch in self.fetches if fetch.undated]
        return asked[-1].missing if asked else 0

    @property
    def notices(self) -> tuple[Notice, ...]:
        """The notices of all fetches, without duplicates."""
        return tuple(dict.fromkeys(notice for fetch in self.fetches for notice in fetch.notices))


REPLAY = "replay:"


class Validated(msgspec.Struct, frozen=True):
    """The inputs and the rules that a validated partition was made with.

    ``inputs`` names raw parts, and as ``replay:<run>`` the replays whose resolved dead letters are in the partition.
    ``complete_run`` is the run that validated all parts at once; later runs have only added to its result. It is empty
    in partitions of releases that did not record it.
    """

    inputs: tuple[str, ...]
    rules_version: str
    rows_in: int
    dead: dict[str, int]
    warnings: dict[str, int]
    complete_run: str = ""

    @property
    def raw_parts(self) -> frozenset[str]:
        """The names of the raw parts that were validated."""
        return frozenset(name for name in self.inputs if not name.startswith(REPLAY))

    @property
    def replays(self) -> list[str]:
        """The ids of the replay runs whose resolved dead letters are in the partition."""
        return [name.removeprefix(REPLAY) for name in self.inputs if name.startswith(REPLAY)]


class Delivered(msgspec.Struct, frozen=True):
    """A delivery to a FHIR server: its address and the validated parts that were delivered."""

    destination: str
    inputs: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True):
    """One partition of one resource type of one source in one layer, with its parts."""

    layer: str
    resource_type: str
    partition_key: str
    run_id: str
    written_at: datetime
    parts: tuple[Part, ...]
    fetched: Fetched | None = None
    validated: Validated | None = None
    delivered: Delivered | None = None
    receipts: tuple[Receipt, ...] = ()
    source: str = DEFAULT_SOURCE

    @property
    def rows(self) -> int:
        """The number of resources in the partition."""
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        """The size of the lines, uncompressed."""
        return sum(part.bytes for part in self.parts)

    @property
    def stored_bytes(self) -> int:
        """The size of the files."""
        return sum(part.stored_bytes for part in self.parts)

    def covers(self, raw: "Manifest") -> bool:
        """Return whether every part of a raw partition is validated in this one."""
        return self.validated is not None and {part.name for part in raw.parts} == self.validated.raw_parts
