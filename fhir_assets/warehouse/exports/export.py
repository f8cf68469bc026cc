"""Exports of resources, dead letters and tables as files.

Rows are streamed to a temporary file, which is stored under its name when it is complete.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import orjson

from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.record import parse_stored, read_header
from fhir_assets.fhir.views import View
from fhir_assets.foreign_errors import choose_store_error
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.storage.blobs import Blobs
from fhir_assets.storage.manifest import Manifest
from fhir_assets.storage.orphans import remove_unfinished_files
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.exports import csv_tables, parquet, xlsx_tables
from fhir_assets.warehouse.ops import audit_log, dead_letters
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import StoredVersion, count_by_window, find_versions, stream_type
from fhir_assets.warehouse.postgres.tables import row_streams
from fhir_assets.warehouse.postgres.tables.layout import TableColumn, build_layout

Format = Literal["ndjson", "parquet", "csv", "xlsx"]


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file of an export: ``rows`` is the number of its lines or table rows, ``sha256`` the hash of its bytes."""

    name: str
    rows: int
    bytes: int
    sha256: str


class Export:
    """Writes files into one folder of ``target``, as a context manager. ``finish`` writes the manifest last.

    In a local folder, ``finish`` moves all files to their final names; a ``with`` block that ends without it does not
    change an earlier export. In a bucket, each file appears when it is complete, because all of them may not fit on the
    disk of this machine. The manifest of an earlier export is deleted before its first file is replaced, because its
    hashes no longer match.

    ``withholding`` is True if a consent policy is on. The export then refuses to write raw resources and dead letters,
    because they include withheld resources.
    """

    def __init__(
        self,
        conn: Session,
        store: Store,
        target: Blobs,
        folder: str,
        *,
        actor: str,
        withholding: bool,
        run_id: str | None = None,
        manifest: str = "manifest.json",
    ) -> None:
        self.withholding = withholding
        self.conn = conn
        self.store = store
        self.run_id = run_id
        self._target = target
        self._folder = folder
        self._actor = actor
        self._manifest = manifest
        self._files: list[ExportedFile] = []
        self._complete: dict[str, Path] = {}
        """The local paths of the files that are complete and not yet in the target, by name."""
        self._publishing = False
        remove_unfinished_files(target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._complete.values():
            path.unlink(missing_ok=True)
        self._target.remove_spool()

    def for_type(self, resource_type: str, partition_keys: Sequence[str] | None) -> "TypeExport":
        """Return the export of one type. ``partition_keys`` are its partitions, None for all partitions."""
        return TypeExport(self, resource_type, partition_keys)

    def write(self, name: str, resource_type: str, write: Callable[[Path], int]) -> ExportedFile:
        """Write one file and its audit record. ``write`` writes the rows to a path and returns their number.

        The audit record is written before the file appears, so that no file exists without one. Raises StoreError.
        """
        path = self._target.create_spooled(".export")
        try:
            file = self._write(name, path, write)
            # End the reading transaction first: other writers of the audit log wait until it ends.
            self.conn.commit()
            with self.conn.transaction():
                audit_record = AuditRecord(
                    "export", self._actor, resource_type, count=file.rows, run_id=self.run_id, detail={"file": name}
                )
                audit_log.record(self.conn, audit_record)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._complete[name] = path
        if not self._target.local:
            self._publish()
        self._files.append(file)
        return file

    def _write(self, name: str, path: Path, write: Callable[[Path], int]) -> ExportedFile:
        try:
            rows = write(path)
            with path.open("rb") as file:
                # Flushed here, so that nothing can fail while the files appear one after the other.
                os.fsync(file.fileno())
            return ExportedFile(name, rows, path.stat().st_size, _compute_sha256(path))
        except OSError as error:
            raise choose_store_error(error)(
                f"cannot write {name} of the export: {error.strerror or type(error).__name__}. Free space or "
                "correct the permissions there, then export again"
            ) from None

    def _publish(self) -> None:
        """Move the complete files to their final names in the target. Raises StoreError."""
        if not self._publishing:
            self._target.delete(self._path(self._manifest))
            self._publishing = True
        for name, path in list(self._complete.items()):
            self._target.put_file(self._path(name), path)
            del self._complete[name]

    def finish(self, *, unreconciled: Mapping[str, Mapping[str, str]] | None = None) -> str:
        """Move all files to their final names, then write the manifest. Return the URL of the folder.

        The manifest lists ``unreconciled``: the reasons of windows that do not reconcile, by resource type and window.
        Raises StoreError.
        """
        self._publish()
        content = {
            "exported_at": datetime.now(UTC).isoformat(),
            "run_id": self.run_id,
            "files": [asdict(file) for file in self._files],
            "unreconciled": {name: windows for name, windows in (unreconciled or {}).items() if windows},
        }
        self._target.put(self._path(self._manifest), orjson.dumps(content, option=orjson.OPT_INDENT_2))
        return f"{self._target.url}/{self._folder}" if self._folder else self._target.url

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name


class TypeExport:
    """Writes the files of one resource type.

    The files of valid resources and tables do not contain resources that are deleted at the source or withheld by
    consent. The files of raw resources and dead letters contain all received resources.
    """

    def __init__(self, export: Export, resource_type: str, partition_keys: Sequence[str] | None) -> None:
        self._export = export
        self._conn = export.conn
        self._store = export.store
        self._type = resource_type
        self._keys = partition_keys

    def write_raw(self) -> ExportedFile:
        """Write ``<Type>.raw.ndjson``: every line as received. Raises ConfigurationError if a consent policy is on."""
        self._refuse_if_withholding("raw")
        return self._write_lines_to("raw", self._read_layer("raw"))

    def write_valid(self) -> ExportedFile:
        """Write ``<Type>.valid.ndjson``: the valid resources that are in the tables, as received."""
        return self._write_lines_to("valid", self._read_valid())

    def write_dead_letters(self, *, of_windows: bool = False) -> ExportedFile:
        """Write ``<Type>.deadletters.ndjson``: each dead letter with its reason.

        ``resource`` is the JSON as received, or a string if it is not valid JSON. The export of a run has its
        dead letters, or with ``of_windows`` those of its windows. Raises ConfigurationError if a consent policy is on.
        """
        self._refuse_if_withholding("dead letters")
        run_id = None if of_windows else self._export.run_id
        selection = Selection(
            run_id=run_id, resource_type=self._type, partition_keys=None if run_id is not None else self._keys
        )
        return self._write_lines_to(
            "deadletters",
            (_build_line(dead_letter, body) for dead_letter, body in dead_letters.stream(self._conn, selection)),
        )

    def write_table(self, view: View, file_format: Format, *, excel: bool = False) -> ExportedFile:
        """Write ``<view>.<format>``: the rows of a view. Encrypted columns stay encrypted.

        ``excel`` states whether a CSV file is for Excel. Raises ConfigurationError if a package that the format
        requires is not installed.
        """
        layout = build_layout(view, encrypted=cipher_of(self._conn).encrypts)
        columns = layout.readable_columns
        names = [column.name for column in columns]
        rows = row_streams.stream_rows(self._conn, layout, columns=names, partition_keys=self._keys)

        def write(path: Path) -> int:
            if file_format == "parquet":
                return parquet.write(path, layout, rows)
            if file_format == "xlsx":
                return xlsx_tables.write(path, columns, rows)
            with path.open("wb") as file:
                if file_format == "csv":
                    return csv_tables.write(file, columns, rows, excel=excel)
                return _write_lines(file, _build_objects(columns, rows))

        return self._export.write(f"{view.name}.{file_format}", self._type, write)

    def _refuse_if_withholding(self, content: str) -> None:
        if self._export.withholding:
            raise ConfigurationError(
                f"CONSENT_POLICY is on, and {content} contain withheld resources as well: export the valid "
                "resources and the tables instead"
            )

    def _read_layer(self, layer: str) -> Iterator[bytes]:
        for manifest in self._list_manifests(layer):
            for batch in self._store.batches(manifest.parts):
                yield from batch

    def _list_manifests(self, layer: str) -> Iterator[Manifest]:
        keys = self._keys if self._keys is not None else self._store.partition_keys(layer, self._type)
        for key in keys:
            manifest = self._store.manifest(layer, self._type, key)
            if manifest is not None:
                yield manifest

    def _read_valid(self) -> Iterator[bytes]:
        """Yield the lines of resources that are in the tables.

        Under a consent policy, only the version in the tables is included, because another version may be about another
        patient, whose data is withheld. If a carry-over to other settings has set partitions aside, the resources that
        are in no validated partition follow, read from the tables.
        """
        expected = count_by_window(self._conn, self._type, partition_keys=self._keys)
        incomplete: dict[str, set[str]] = {key: set() for key in expected}
        for line, identity, version, is_stored in self._read_validated():
            key = version.partition_key
            if is_stored and key in incomplete:
                incomplete[key].add(identity)
                if len(incomplete[key]) >= expected[key]:
                    del incomplete[key]  # Of large exports, only the ids of few windows are in memory at a time.
            if is_stored or not self._export.withholding:
                yield line
        if incomplete:
            yield from self._read_from_tables(sorted(incomplete))

    def _read_validated(self) -> Iterator[tuple[bytes, str, StoredVersion, bool]]:
        """Yield the validated lines of resources that are in the tables, with their ids and the versions there.

        The last value states whether the line is the version in the tables.
        """
        for manifest in self._list_manifests("validated"):
            for batch in self._store.batches_with_arrivals(manifest.parts):
                headers = [read_header(line) for line in batch.lines]
                stored = find_versions(self._conn, self._type, [header.id or "" for header in headers])
                for line, header, arrived in zip(batch.lines, headers, batch.times(), strict=False):
                    version = stored.get(header.id or "")
                    if version:
                        text = header.meta.last_updated if header.meta else None
                        updated = parse_stored(text, dated=batch.dated, arrival_known=arrived is not None)
                        is_stored = version.is_version(updated, arrived, manifest.partition_key)
                        yield line, header.id or "", version, is_stored

    def _read_from_tables(self, partition_keys: Sequence[str]) -> Iterator[bytes]:
        """Yield resources from the tables whose version is in no validated partition, for the given windows."""
        keys = frozenset(partition_keys)
        known = {
            identity
            for _, identity, version, is_stored in self._read_validated()
            if is_stored and version.partition_key in keys
        }
        for resource in stream_type(self._conn, self._type, partition_keys=partition_keys):
            if resource.id not in known:
                yield resource.body

    def _write_lines_to(self, kind: str, lines: Iterable[bytes]) -> ExportedFile:
        def write(path: Path) -> int:
            with path.open("wb") as file:
                return _write_lines(file, lines)

        return self._export.write(f"{self._type}.{kind}.ndjson", self._type, write)


def build_run_folder(run_id: str, started_at: datetime) -> str:
    """Return the folder of the export of a run: ``exports/run_<id>_<timestamp>``."""
    return f"exports/run_{run_id}_{started_at:%Y%m%dT%H%M%SZ}"


def find_run_windows(conn: Connection, run_id: str) -> tuple[str, dict[str, list[str]]]:
    """Return the id of the run whose id starts with ``run_id``, and its partition keys by resource type.

    Raises KeyError if there is no such run, or more than one.
    """
    rows = conn.execute(
        """
        SELECT run_id, resource_type, array_agg(partition_key ORDER BY partition_key)
        FROM ops.ingestion_runs
        WHERE starts_with(run_id, %s)
        GROUP BY 1, 2
        """,
        [run_id],
    ).fetchall()
    if len({row[0] for row in rows}) != 1:
        raise KeyError(run_id)
    return rows[0][0], {resource_type: keys for _, resource_type, keys in rows}


def _write_lines(file: BinaryIO, lines: Iterable[bytes]) -> int:
    count = 0
    for line in lines:
        file.write(line)
        file.write(b"\n")
        count += 1
    return count


def _build_objects(columns: Sequence[TableColumn], rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    """Yield rows as JSON objects. Decimals keep their digits, and times have the form that they have in CSV."""
    names = [column.name for column in columns]
    formatted = [(n, _TO_JSON[column.type]) for n, column in enumerate(columns) if column.type in _TO_JSON]
    for row in rows:
        values = list(row)
        for n, convert in formatted:
            if values[n] is not None:
                values[n] = convert(values[n])
        yield orjson.dumps(dict(zip(names, values, strict=True)), default=str)


_TO_JSON: dict[str, Callable[[Any], object]] = {
    **csv_tables.SCALARS,
    "numeric": lambda value: orjson.Fragment(csv_tables.format_decimal(value)),
}


def _build_line(dead_letter: dead_letters.StoredDeadLetter, body: bytes | None) -> bytes:
    fields = asdict(dead_letter)
    if body is not None:
        try:
            fields["resource"] = orjson.Fragment(body) if orjson.loads(body) is not None else None
        except orjson.JSONDecodeError:
            fields["resource"] = body.decode("utf-8", "backslashreplace")
    return orjson.dumps(fields)


def _compute_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
