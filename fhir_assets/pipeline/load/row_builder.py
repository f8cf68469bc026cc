"""The job of a worker in a load: a batch of valid lines in, resources and rows ready to be copied out."""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from fhir_assets.fhir.compartment import find_patient_ids
from fhir_assets.fhir.record import Record, parse_instant
from fhir_assets.fhir.views import RowError, TypeViews, View
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Stage
from fhir_assets.warehouse.postgres.tables.copy_blocks import Block, Preparation, Unfit

_parse = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode

_NO_ID = "the resource has no id, so no row could be told from another: give it one at the source or by `edit`"


class Batch(NamedTuple):
    """Lines of one partition; ``arrived`` dates those without ``lastUpdated``."""

    lines: list[bytes]
    partition_key: str
    arrived: datetime

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(map(len, self.lines))


class RejectedLine(NamedTuple):
    """A line that no rows can be made of, by its place in the batch, and why."""

    position: int
    resource_id: str | None
    stage: Stage
    rule: str
    path: str
    message: str

    def build_dead_letter(self, resource_type: str, batch: Batch) -> DeadLetter:
        """The dead letter of the line."""
        return DeadLetter(
            resource_type=resource_type,
            resource_id=self.resource_id,
            stage=self.stage,
            rule=self.rule,
            path=self.path,
            message=self.message,
            resource=batch.lines[self.position],
            partition_key=batch.partition_key,
        )


class BuiltRows(NamedTuple):
    """What came of a batch: the resources that are ready to be copied, and the lines left undone."""

    block: Block
    rejected: list[RejectedLine]


class RowBuilder:
    """Makes the rows of all ``views`` of one type, sealed if there are keys. Pickles as views and keys."""

    def __init__(self, views: Sequence[View], cipher: Cipher) -> None:
        self._views = TypeViews(views, empty_join=False)
        self._preparation = Preparation(views, cipher)

    def __reduce__(self) -> tuple[object, ...]:
        return RowBuilder, (self._preparation.views, self._preparation.cipher)

    def __call__(self, batch: Batch) -> BuiltRows:
        prepared, undone = [], []
        for place, line in enumerate(batch.lines):
            resource = _parse(line)
            record = _record(resource, line, batch.arrived)
            if record is None:
                undone.append(RejectedLine(place, None, "transform", "id", "id", _NO_ID))
                continue
            try:
                rows = self._views.rows(resource)
                prepared.append((place, self._preparation.prepare(record, batch.partition_key, rows)))
            except RowError as error:
                where = f"{error.view}.{error.column}"
                undone.append(RejectedLine(place, record.id, "transform", "view", where, error.message))
            except Unfit as unfit:
                where = format_column_path(unfit.view, unfit.column)
                undone.append(RejectedLine(place, record.id, "load", "unloadable", where, unfit.message))
        return BuiltRows(Block.of(prepared, len(self._preparation.views)), undone)


def format_column_path(view: str | None, column: str | None) -> str:
    """The path of a dead letter of stage ``load``."""
    return f"{view}.{column}" if view else "resource"


def _record(resource: dict[str, Any], line: bytes, arrived: datetime) -> Record | None:
    identity = resource.get("id")
    if identity is None:
        return None
    meta = resource.get("meta") or {}
    return Record(
        resource["resourceType"],
        identity,
        meta.get("versionId"),
        parse_instant(meta.get("lastUpdated")),
        arrived,
        line,
        find_patient_ids(resource),
    )
