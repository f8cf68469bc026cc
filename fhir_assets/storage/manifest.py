"""The manifest of a partition: which parts it has, and how they came about.

A reader sees a partition only through its manifest, which is written last and in one step.
"""

from datetime import datetime

import msgspec


class Part(msgspec.Struct, frozen=True):
    """One gzip file of NDJSON. ``bytes`` counts the lines with their line feeds, ``stored_bytes`` the file;
    ``first`` and ``last`` bound the ``lastUpdated`` of its resources. ``origin`` says by what it was received
    (``landing:<hash>``), None for what was fetched from the configured source.
    """

    name: str
    rows: int
    bytes: int
    stored_bytes: int
    first: datetime | None = None
    last: datetime | None = None
    origin: str | None = None


class Receipt(msgspec.Struct, frozen=True):
    """What came into a raw partition by another door than the source: ``rows`` resources, and ``rejected`` that
    became dead letters at once.
    """

    origin: str
    at: datetime
    rows: int
    rejected: int


class Fetch(msgspec.Struct, frozen=True):
    """One asking of the source for a stretch of the window, and what came of it.

    ``server_total`` is what the source said it has, None if it cannot say; ``matched`` what it gave;
    ``repeated`` those of them that were there already; ``rejected`` those that became dead letters at once.
    """

    start: datetime | None
    end: datetime
    at: datetime
    server_total: int | None
    matched: int
    repeated: int
    rejected: int


class Fetched(msgspec.Struct, frozen=True):
    """How a raw partition came about. ``until``: the window has been read up to here."""

    until: datetime
    complete: bool
    fetches: tuple[Fetch, ...]
    source_state: str | None = None


REPLAY = "replay:"


class Validated(msgspec.Struct, frozen=True):
    """How a validated partition came about: from which raw parts, under which rules. ``inputs`` names besides the
    parts, as ``replay:<run>``, the replays whose healed dead letters are in the partition too.
    """

    inputs: tuple[str, ...]
    rules_version: str
    rows_in: int
    dead: dict[str, int]
    warnings: dict[str, int]

    @property
    def raw_parts(self) -> frozenset[str]:
        """The names of the raw parts that were judged."""
        return frozenset(name for name in self.inputs if not name.startswith(REPLAY))

    @property
    def replays(self) -> list[str]:
        """The runs whose healed letters are in the partition."""
        return [name.removeprefix(REPLAY) for name in self.inputs if name.startswith(REPLAY)]


class Delivered(msgspec.Struct, frozen=True):
    """What was delivered: which validated parts, to which FHIR server."""

    destination: str
    inputs: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True):
    """One partition of one type in one layer."""

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

    @property
    def rows(self) -> int:
        """How many resources the partition holds."""
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        """How many bytes its lines take, uncompressed."""
        return sum(part.bytes for part in self.parts)

    @property
    def stored_bytes(self) -> int:
        """How many bytes its files take."""
        return sum(part.stored_bytes for part in self.parts)
