"""Resources and the rows of their views as text in the format of COPY.

Encoding needs no database connection and can run in worker processes. A worker sends a batch of encoded resources to
the loading process as a ``CopyBlock``: a few long texts that COPY accepts unchanged.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Self

from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import View
from fhir_assets.fhir.views.row_identity import find_key_column
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.warehouse.postgres.tables.encoding import (
    MAX_INDEXED_BYTES,
    NULL,
    UnstorableValue,
    build_row_encoder,
    encode_body,
    encode_text_array,
    escape_text,
)

ViewRows = Sequence[Sequence[Sequence[object]]]
"""The rows of one resource: for each view a list of rows, each with the JSON values of the view's columns in order."""

_MAX_BIGINT = 2**63 - 1


class EncodedResource(NamedTuple):
    """A resource in the format of COPY.

    ``resource_line`` is its line in ``fhir.resource`` without the columns that the load adds. ``view_lines`` has one
    text for each view: the lines of all rows of the resource. Of two versions of a resource that are both ``dated``, or
    both not, the one with the greater (``timestamp``, ``version_number``) is newer; ``timestamp`` is in seconds since
    1970. ``version_order`` has the complete order.
    """

    id: str
    timestamp: float
    version_number: int
    dated: bool
    resource_line: bytes
    view_lines: list[bytes]


class JoinedTexts(NamedTuple):
    """A concatenation of texts, with the offset of the end of each text."""

    text: bytes
    ends: "array[int]"

    @classmethod
    def join(cls, texts: Sequence[bytes]) -> Self:
        """Concatenate ``texts``."""
        return cls(b"".join(texts), array("Q", accumulate(map(len, texts))))

    def select(self, indexes: Iterable[int]) -> "JoinedTexts":
        """Return the texts with these indexes, in the given order."""
        return JoinedTexts.join([self.text[self.ends[n - 1] if n else 0 : self.ends[n]] for n in indexes])


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Encoded resources, stored by columns. Pickling a block copies a few long texts instead of many small objects.

    ``line_numbers`` contains the index of each resource's line in its batch. The other fields correspond to the fields
    of ``EncodedResource``; ``view_lines`` has one element for each view.
    """

    line_numbers: "array[int]"
    ids: list[str]
    timestamps: "array[float]"
    version_numbers: "array[int]"
    dated: bytes
    resource_lines: JoinedTexts
    view_lines: list[JoinedTexts]

    @classmethod
    def build(cls, encoded: Sequence[tuple[int, EncodedResource]], view_count: int) -> Self:
        """Build a block from pairs of a line number and an encoded resource."""
        resources = [resource for _, resource in encoded]
        return cls(
            array("Q", [line_number for line_number, _ in encoded]),
            [resource.id for resource in resources],
            array("d", [resource.timestamp for resource in resources]),
            array("Q", [resource.version_number for resource in resources]),
            bytes([resource.dated for resource in resources]),
            JoinedTexts.join([resource.resource_line for resource in resources]),
            [JoinedTexts.join([resource.view_lines[view] for resource in resources]) for view in range(view_count)],
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> int:
        """The number of bytes to be copied."""
        return len(self.resource_lines.text) + sum(len(lines.text) for lines in self.view_lines)

    def select(self, indexes: Sequence[int]) -> "CopyBlock":
        """Return a block of the resources with these indexes, in the given order."""
        return CopyBlock(
            array("Q", [self.line_numbers[n] for n in indexes]),
            [self.ids[n] for n in indexes],
            array("d", [self.timestamps[n] for n in indexes]),
            array("Q", [self.version_numbers[n] for n in indexes]),
            bytes([self.dated[n] for n in indexes]),
            self.resource_lines.select(indexes),
            [lines.select(indexes) for lines in self.view_lines],
        )


class UnstorableResource(Exception):
    """Raised for a resource that Postgres cannot store.

    ``view`` and ``column`` name the column that does not accept a value. Both are None if the JSON of the resource
    cannot be stored.
    """

    def __init__(self, view: str | None, column: str | None, message: str) -> None:
        super().__init__(message)
        self.view = view
        self.column = column
        self.message = message


class ResourceEncoder:
    """Encodes resources of one type of ``source`` and their rows of ``views``, encrypted if ``cipher`` has keys.

    It can be pickled.
    """

    def __init__(self, views: Sequence[View], cipher: Cipher, source: str) -> None:
        self.views = tuple(views)
        self.cipher = cipher
        self.source = source
        self._columns = [[column.name for column in view.columns] for view in views]
        self._row_encoders = [build_row_encoder(view, cipher, source) for view in views]
        self._has_own_key = [find_key_column(view) is not None for view in views]

    def __reduce__(self) -> tuple[object, ...]:
        return ResourceEncoder, (self.views, self.cipher, self.source)

    def encode(self, record: Record, partition_key: str, rows: ViewRows) -> EncodedResource:
        """Return a resource and its rows in the format of COPY. ``rows`` has an element for each view.

        Raises UnstorableResource.
        """
        try:
            key = escape_text(record.id)
            version = NULL if record.version_id is None else escape_text(record.version_id)
            body = encode_body(record.body, self.cipher, self.source, record.resource_type, record.id)
            patients = NULL if record.patients is None else _encode_texts(record.patients)
            keyless = NULL if record.keyless is None else _encode_texts(record.keyless)
            mentions = NULL if record.mentions is None else encode_text_array(record.mentions)
            identifiers = NULL if record.identifiers is None else encode_text_array(record.identifiers)
        except UnstorableValue as error:
            raise UnstorableResource(None, None, str(error)) from None
        if len(key) > MAX_INDEXED_BYTES // 4:
            raise UnstorableResource(None, "id", "an id that is too long to be a key")
        version_number = parse_version_number(record.version_id)
        dated = record.last_updated is not None
        as_of = record.as_of.isoformat()
        last_updated = as_of if dated else NULL
        arrived = _format_arrival(record.arrived) if dated else as_of
        columns = (
            f"{key}\t{version}\t{NULL if version_number is None else version_number}\t{last_updated}\t{as_of}\t"
            f"{arrived}\t{_escape_partition_key(partition_key)}\t{patients}\t{keyless}\t{mentions}\t"
            f"{identifiers}\t"
        ).encode()
        view_lines: list[bytes] = []
        for view, encode_row in enumerate(self._row_encoders):
            if not rows[view]:
                view_lines.append(b"")
                continue
            try:
                if self._has_own_key[view]:
                    text = "".join([f"{encode_row(row, record.id)}\n" for row in rows[view]])
                else:
                    text = "".join([f"{key}\t{encode_row(row, record.id)}\n" for row in rows[view]])
            except UnstorableValue as error:
                column = self._columns[view][error.args[1]]
                raise UnstorableResource(self.views[view].name, column, str(error.args[0])) from None
            view_lines.append(text.encode())
        return EncodedResource(
            record.id, record.as_of.timestamp(), version_number or 0, dated, b"%b%b\n" % (columns, body), view_lines
        )


# Consecutive resources belong to the same partition, arrived together, and often belong to the same patients.
_format_arrival = lru_cache(64)(datetime.isoformat)
_escape_partition_key = lru_cache(16)(escape_text)
_encode_texts = lru_cache(4096)(encode_text_array)


def parse_version_number(version_id: str | None) -> int | None:
    """Return ``meta.versionId`` as a number, or None if it is not a number or does not fit a bigint."""
    if version_id is None or not version_id.isascii() or not version_id.isdigit() or len(version_id) > 19:
        return None
    number = int(version_id)
    return number if number <= _MAX_BIGINT else None
