"""Builds the table rows of batches of valid resources; runs in the worker processes of a load."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

import msgspec

from fhir_assets.fhir.compartment import find_patient_ids
from fhir_assets.fhir.conditional_references import has_conditional, list_conditions, list_identifiers, resolve
from fhir_assets.fhir.identifier_tokens import list_own_tokens
from fhir_assets.fhir.record import Record, parse_instant, parse_stored
from fhir_assets.fhir.references import Bases, find_keyless
from fhir_assets.fhir.subjects import find_subjects
from fhir_assets.fhir.views import CompiledViews, RowError, View
from fhir_assets.privacy.encryption import Cipher
from fhir_assets.storage.manifest import Arrival, list_times
from fhir_assets.warehouse.ops.dead_letters import DeadLetter, Stage
from fhir_assets.warehouse.postgres.tables.copy_blocks import CopyBlock, ResourceEncoder, UnstorableResource

_parse = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode

_NO_ID = "the resource has no id, so its rows would have no key: give it one at the source or by `edit`"


class Batch(NamedTuple):
    """Lines of one partition.

    ``arrivals`` are the times at which the lines arrived. If they are not known, resources without ``lastUpdated`` get
    the time ``arrived``. If ``dated`` is False, the ``lastUpdated`` of the lines is ignored. ``targets`` maps the
    conditions of conditional references to the ids of the resources that match them (``fhir/conditional_references``).
    ``with_identifiers`` states whether to determine the tokens of the resources' own identifiers.
    """

    lines: list[bytes]
    partition_key: str
    arrived: datetime
    arrivals: tuple[Arrival, ...] = ()
    dated: bool = True
    targets: Mapping[str, str] | None = None
    with_identifiers: bool = False

    @property
    def size(self) -> int:
        """The size of the lines in bytes, without line feeds."""
        return sum(map(len, self.lines))

    def times(self) -> Iterator[datetime | None]:
        """Yield the time of arrival of each line. If they are not known, yield None endlessly."""
        return list_times(self.arrivals)


class FailedResource(Protocol):
    """The attributes of a dead letter that the load of its resource needs."""

    @property
    def partition_key(self) -> str:
        """The partition of the resource."""
        ...

    @property
    def arrived(self) -> datetime | None:
        """The time of its arrival, if known."""
        ...

    @property
    def dated(self) -> bool:
        """Whether its ``lastUpdated`` is used."""
        ...


def build_batch_of_one(line: bytes, failed: FailedResource, arrived: datetime) -> Batch:
    """Return the batch that loads the resource of a dead letter, which may be corrected, from ``line``.

    The resource keeps the time of its first arrival; ``arrived`` is used if that is not known.
    """
    arrivals = (Arrival(1, failed.arrived),) if failed.arrived else ()
    return Batch([line], failed.partition_key, arrived, arrivals, failed.dated)


class RejectedLine(NamedTuple):
    """A line that cannot be turned into rows: its index in the batch, and the fields of its dead letter."""

    position: int
    resource_id: str | None
    stage: Stage
    rule: str
    path: str
    message: str

    def build_dead_letter(self, resource_type: str, batch: Batch) -> DeadLetter:
        """Build the dead letter of the line."""
        return DeadLetter(
            resource_type=resource_type,
            resource_id=self.resource_id,
            stage=self.stage,
            rule=self.rule,
            path=self.path,
            message=self.message,
            resource=batch.lines[self.position],
            partition_key=batch.partition_key,
            arrived=next(islice(batch.times(), self.position, None)),
            dated=batch.dated,
        )


class BuiltRows(NamedTuple):
    """The rows of a batch: a block of resources and rows in the format of COPY, and the rejected lines."""

    block: CopyBlock
    rejected: list[RejectedLine]


class RowBuilder:
    """Builds the rows of all ``views`` of a resource type of ``source``, with encrypted columns if ``cipher`` has keys.

    ``with_subjects`` also determines which patients each resource is about, which a consent policy needs. A pickle
    contains the arguments only; the views are compiled again when it is loaded.
    """

    def __init__(self, views: Sequence[View], cipher: Cipher, source: str, *, with_subjects: bool = False) -> None:
        self._views = CompiledViews(views, empty_join=False)
        self._encoder = ResourceEncoder(views, cipher, source)
        self._with_subjects = with_subjects

    def __reduce__(self) -> tuple[object, ...]:
        encoder = self._encoder
        arguments = (encoder.views, encoder.cipher, encoder.source)
        return partial(RowBuilder, with_subjects=self._with_subjects), arguments

    def __call__(self, batch: Batch) -> BuiltRows:
        """Build the rows of a batch."""
        prepared, rejected = [], []
        for index, (line, arrived) in enumerate(zip(batch.lines, batch.times(), strict=False)):
            resource, record = self._read(line, arrived, batch)
            if record is None:
                rejected.append(RejectedLine(index, None, "transform", "id", "id", _NO_ID))
                continue
            try:
                rows = self._views.rows(resource)
                prepared.append((index, self._encoder.encode(record, batch.partition_key, rows)))
            except RowError as error:
                path = f"{error.view}.{error.column}"
                rejected.append(RejectedLine(index, record.id, "transform", "view", path, error.message))
            except UnstorableResource as error:
                path = format_column_path(error.view, error.column)
                rejected.append(RejectedLine(index, record.id, "load", "unloadable", path, error.message))
        return BuiltRows(CopyBlock.build(prepared, len(self._encoder.views)), rejected)

    def read(self, line: bytes, batch: Batch) -> Record | None:
        """Return the record of one line of a batch, None if it has no id. Its rows are not built."""
        return self._read(line, None, batch)[1]

    def _read(self, line: bytes, arrived: datetime | None, batch: Batch) -> tuple[dict[str, Any], Record | None]:
        """Return the resource on a line, with resolved conditional references, and its record."""
        resource = _parse(line)
        record = _build_record(resource, line, arrived, batch, self._views.reference_bases)
        if record is not None and self._with_subjects:
            subjects = find_subjects(resource, self._views.reference_bases, self._encoder.cipher.fingerprint)
            record = replace(record, patients=subjects.patients, mentions=subjects.mentions)
        if record is not None and (batch.with_identifiers or (record.keyless and has_conditional(record.keyless))):
            return self._resolve_conditional_references(resource, record, batch)
        return resource, record

    def _resolve_conditional_references(
        self, resource: dict[str, Any], record: Record, batch: Batch
    ) -> tuple[dict[str, Any], Record]:
        """Return a resource with resolved references, and its record with identifiers."""
        bases, hash_identifier = self._views.reference_bases, self._encoder.cipher.fingerprint
        own = list_own_tokens(resource.get("identifier"), hash_identifier) if batch.with_identifiers else None
        conditions = list(dict.fromkeys(list_conditions(record.body, bases, hash_identifier)))
        targets = batch.targets or {}
        record = replace(record, identifiers=list_identifiers(own, conditions, targets))
        if targets.keys().isdisjoint(conditions):
            return resource, record
        resolved_body = resolve(record.body, targets, bases, hash_identifier)
        resource = _parse(resolved_body)
        record = replace(record, keyless=find_keyless(resource, resolved_body, bases))
        if not self._with_subjects:
            return resource, replace(record, patients=find_patient_ids(resource, bases))
        # ``patients`` keeps the tokens, because consent itself matches patients by identifier, also withheld ones.
        mentions = find_subjects(resource, bases, hash_identifier).mentions
        return resource, replace(record, mentions=tuple(dict.fromkeys((*(record.mentions or ()), *mentions))))


def parse_resource(line: bytes) -> dict[str, Any]:
    """Return a resource from its JSON, with decimals as they were received."""
    return _parse(line)


def format_column_path(view: str | None, column: str | None) -> str:
    """Return ``view.column`` as the path of a dead letter, or ``resource`` if no view is concerned."""
    return f"{view}.{column}" if view else "resource"


def _build_record(
    resource: dict[str, Any], line: bytes, arrived: datetime | None, batch: Batch, bases: Bases
) -> Record | None:
    identity = resource.get("id")
    if identity is None:
        return None
    meta = resource.get("meta") or {}
    text = meta.get("lastUpdated")
    if arrived is None:
        last_updated = parse_stored(text, dated=batch.dated, arrival_known=False)
    else:
        last_updated = parse_instant(text) if batch.dated else None
    return Record(
        resource["resourceType"],
        identity,
        meta.get("versionId"),
        last_updated,
        arrived or last_updated or batch.arrived,
        line,
        find_patient_ids(resource, bases),
        keyless=find_keyless(resource, line, bases),
    )
