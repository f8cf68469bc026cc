"""Resources and their rows as the text that COPY reads: all that can be done without the database, in any process."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Self

from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.warehouse.postgres.tables.encoding import (
    MAX_INDEXED_BYTES,
    NULL,
    UnstorableValue,
    body_line,
    build_row_encoder,
    escape_text,
    texts,
)

ViewRows = Sequence[Sequence[Sequence[object]]]
"""Per view its rows, each with its values as JSON has them, in the order of the view's columns."""

_LARGEST_NUMBER = 2**63 - 1


class Prepared(NamedTuple):
    """A resource ready to be copied: ``head`` is its line in ``fhir.resource`` without what the load adds, ``rows`` its
    lines in each view. ``moment`` and ``number`` tell its versions apart: the greatest is the newest.
    """

    id: str
    moment: float
    number: int
    head: bytes
    rows: list[bytes]


class Texts(NamedTuple):
    """Texts one behind the other, and where each ends."""

    text: bytes
    ends: "array[int]"

    @classmethod
    def of(cls, texts: Sequence[bytes]) -> Self:
        """These texts."""
        return cls(b"".join(texts), array("Q", accumulate(map(len, texts))))

    def pick(self, numbers: Iterable[int]) -> "Texts":
        """Some of them."""
        return Texts.of([self.text[self.ends[n - 1] if n else 0 : self.ends[n]] for n in numbers])


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Resources ready to be copied, by columns: from process to process as a few long texts, which COPY takes as they
    are. ``places`` are those of their lines in the batch that they come from; the rest see ``Prepared``.
    """

    places: "array[int]"
    ids: list[str]
    moments: "array[float]"
    numbers: "array[int]"
    heads: Texts
    rows: list[Texts]

    @classmethod
    def of(cls, prepared: Sequence[tuple[int, Prepared]], views: int) -> Self:
        """A block of resources, each with its place; so many views have rows of them."""
        resources = [each for _, each in prepared]
        return cls(
            array("Q", [place for place, _ in prepared]),
            [each.id for each in resources],
            array("d", [each.moment for each in resources]),
            array("Q", [each.number for each in resources]),
            Texts.of([each.head for each in resources]),
            [Texts.of([each.rows[view] for each in resources]) for view in range(views)],
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> int:
        """Bytes to be copied."""
        return len(self.heads.text) + sum(len(each.text) for each in self.rows)

    def pick(self, numbers: Sequence[int]) -> "CopyBlock":
        """Some of its resources."""
        return CopyBlock(
            array("Q", [self.places[n] for n in numbers]),
            [self.ids[n] for n in numbers],
            array("d", [self.moments[n] for n in numbers]),
            array("Q", [self.numbers[n] for n in numbers]),
            self.heads.pick(numbers),
            [each.pick(numbers) for each in self.rows],
        )


class UnstorableResource(Exception):
    """A resource that Postgres cannot hold; ``view`` and ``column`` are None if the fault is in its JSON as such."""

    def __init__(self, view: str | None, column: str | None, message: str) -> None:
        super().__init__(message)
        self.view = view
        self.column = column
        self.message = message


class ResourceEncoder:
    """Prepares resources of one type with their rows of ``views``, sealed if there are keys. Pickles as these two."""

    def __init__(self, views: Sequence[View], cipher: Cipher) -> None:
        self.views = tuple(views)
        self.cipher = cipher
        self._columns = [[column.name for column in view.columns] for view in views]
        self._encoders = [build_row_encoder(view, cipher) for view in views]

    def __reduce__(self) -> tuple[object, ...]:
        return ResourceEncoder, (self.views, self.cipher)

    def prepare(self, record: Record, partition_key: str, rows: ViewRows) -> Prepared:
        """The COPY text of a resource and its rows. Raises Unfit."""
        try:
            key = escape_text(record.id)
            version = NULL if record.version_id is None else escape_text(record.version_id)
            body = body_line(record.body, self.cipher)
            patients = NULL if record.patients is None else _patients_text(record.patients)
        except UnstorableValue as refused:
            raise UnstorableResource(None, None, str(refused)) from None
        if len(key) > MAX_INDEXED_BYTES // 4:
            raise UnstorableResource(None, "id", "an id that is too long to be a key")
        number = version_number(record.version_id)
        at = record.as_of.isoformat()
        updated = at if record.last_updated is not None else NULL
        head = (
            f"{key}\t{version}\t{NULL if number is None else number}\t{updated}\t{at}\t"
            f"{_partition_text(partition_key)}\t{patients}\t"
        ).encode()
        lines: list[bytes] = []
        for place, encoder in enumerate(self._encoders):
            try:
                text = "".join([f"{key}\t{encoder(row)}\n" for row in rows[place]])
            except UnstorableValue as refused:
                column = self._columns[place][refused.args[1]]
                raise UnstorableResource(self.views[place].name, column, str(refused.args[0])) from None
            lines.append(text.encode())
        return Prepared(record.id, record.as_of.timestamp(), number or 0, b"%b%b\n" % (head, body), lines)


# A resource's neighbours are of the same partition, and often of the same patients.
_partition_text = lru_cache(16)(escape_text)
_patients_text = lru_cache(4096)(texts)


def version_number(version_id: str | None) -> int | None:
    """``meta.versionId`` where it is a number that Postgres can hold."""
    if version_id is None or not version_id.isascii() or not version_id.isdigit() or len(version_id) > 19:
        return None
    number = int(version_id)
    return number if number <= _LARGEST_NUMBER else None
