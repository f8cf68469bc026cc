"""Resources and their rows as the text that COPY reads: all that can be done without the database, in any process."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.privacy.sealing import CLEAR, Sealing
from fhir_assets.warehouse.encode import LONGEST_INDEXED, NULL, Refused, body_line, plain_text, row_encoder, texts

ViewRows = Sequence[Sequence[Sequence[object]]]
"""Per view its rows, each with its values as JSON has them, in the order of the view's columns."""

_LARGEST_NUMBER = 2**63 - 1


class Prepared(NamedTuple):
    """A resource ready to be copied: ``head`` is its line in ``fhir.resource``, ``lines`` are its rows per view,
    ``counts`` how many; ``order`` tells its versions apart, the greatest is the newest.
    """

    id: str
    order: tuple[float, int]
    head: bytes
    lines: list[bytes]
    counts: list[int]

    @property
    def size(self) -> int:
        """Bytes to be copied."""
        return len(self.head) + sum(map(len, self.lines))


class Unfit(Exception):
    """A resource that Postgres cannot hold; ``view`` and ``column`` are None if the fault is in its JSON as such."""

    def __init__(self, view: str | None, column: str | None, message: str) -> None:
        super().__init__(message)
        self.view = view
        self.column = column
        self.message = message


class Preparation:
    """Prepares resources of one type with their rows of ``views``, sealed if there are keys. Pickles as these two."""

    def __init__(self, views: Sequence[View], sealing: Sealing = CLEAR) -> None:
        self.views = tuple(views)
        self.sealing = sealing
        self._columns = [[column.name for column in view.columns] for view in views]
        self._encoders = [row_encoder(view, sealing) for view in views]

    def __reduce__(self) -> tuple[object, ...]:
        return Preparation, (self.views, self.sealing)

    def prepare(self, record: Record, partition_key: str, rows: ViewRows) -> Prepared:
        """The COPY text of a resource and its rows. Raises Unfit."""
        try:
            key = plain_text(record.id)
            version = NULL if record.version_id is None else plain_text(record.version_id)
            body = body_line(record.body, self.sealing)
            patients = NULL if record.patients is None else _patients_text(record.patients)
        except Refused as refused:
            raise Unfit(None, None, str(refused)) from None
        if len(key) > LONGEST_INDEXED // 4:
            raise Unfit(None, "id", "an id that is too long to be a key")
        number = version_number(record.version_id)
        at = record.as_of.isoformat()
        updated = at if record.last_updated is not None else NULL
        head = (
            f"{key}\t{version}\t{NULL if number is None else number}\t{updated}\t{at}\t"
            f"{_partition_text(partition_key)}\t{patients}\t"
        ).encode() + body
        lines = []
        for place, encoder in enumerate(self._encoders):
            try:
                text = "".join([f"{key}\t{encoder(row)}\n" for row in rows[place]])
            except Refused as refused:
                column = self._columns[place][refused.args[1]]
                raise Unfit(self.views[place].name, column, str(refused.args[0])) from None
            lines.append(text.encode())
        order = (record.as_of.timestamp(), number or 0)
        return Prepared(record.id, order, head, lines, list(map(len, rows)))


# A resource's neighbours are of the same partition, and often of the same patients.
_partition_text = lru_cache(16)(plain_text)
_patients_text = lru_cache(4096)(texts)


def version_number(version_id: str | None) -> int | None:
    """``meta.versionId`` where it is a number that Postgres can hold."""
    if version_id is None or not version_id.isascii() or not version_id.isdigit() or len(version_id) > 19:
        return None
    number = int(version_id)
    return number if number <= _LARGEST_NUMBER else None
