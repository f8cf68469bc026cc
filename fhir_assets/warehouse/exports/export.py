"""Exports: resources, dead letters and tables as files, streamed, each whole under its name or not there at all."""

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson

from fhir_assets.errors import ConfigurationError, StoreError
from fhir_assets.fhir.record import read_header
from fhir_assets.fhir.views import View
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.storage.blobs import Blobs
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.exports import parquet
from fhir_assets.warehouse.ops import audit_log, dead_letters
from fhir_assets.warehouse.ops.dead_letters import Selection
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.tables import row_streams
from fhir_assets.warehouse.postgres.tables.layout import build_layout

Format = Literal["ndjson", "parquet", "csv"]

_FETCHED = 2000


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file of an export: ``rows`` are lines or table rows, ``sha256`` is of its bytes."""

    name: str
    rows: int
    bytes: int
    sha256: str


class Export:
    """Writes files into one folder of ``target``; ``finish`` adds ``manifest``, last. One that an earlier export left
    there goes first: it would vouch for files that are about to be replaced.

    ``withholding`` says that a consent policy is in force: raw and dead letters, which hold what it withholds, are
    refused then.
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
        target.delete(self._path(manifest))

    def for_type(self, resource_type: str, partition_keys: Sequence[str] | None) -> "TypeExport":
        """The files of a type, of some windows or (None) of all there are."""
        return TypeExport(self, resource_type, partition_keys)

    def write(self, name: str, resource_type: str, write: Callable[[Path], int]) -> ExportedFile:
        """One file, which ``write`` fills and counts the rows of; it goes to its name when it is whole, on record."""
        path = self._target.spool() / f"{os.urandom(8).hex()}.export"
        try:
            rows = write(path)
            file = ExportedFile(name, rows, path.stat().st_size, _sha256(path))
            self._target.put_file(self._path(name), path)
        except OSError as error:
            raise StoreError(
                f"cannot write {name} of the export: {error.strerror or type(error).__name__}. Free space or mend the "
                "rights there, then export again"
            ) from None
        finally:
            path.unlink(missing_ok=True)
        # What was read is over; others wait for their turn in the log until this transaction ends.
        self.conn.commit()
        try:
            with self.conn.transaction():
                audit_record = AuditRecord(
                    "export", self._actor, resource_type, count=rows, run_id=self.run_id, detail={"file": name}
                )
                audit_log.record(self.conn, audit_record)
        except BaseException:
            # What cannot be put on record does not leave.
            self._target.delete(self._path(name))
            raise
        self._files.append(file)
        return file

    def finish(self) -> str:
        """Write the manifest. Returns where the export is."""
        content = {
            "exported_at": datetime.now(UTC).isoformat(),
            "run_id": self.run_id,
            "files": [asdict(file) for file in self._files],
        }
        self._target.put(self._path(self._manifest), orjson.dumps(content, option=orjson.OPT_INDENT_2))
        return f"{self._target.url}/{self._folder}" if self._folder else self._target.url

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name


class TypeExport:
    """The files of one type. What has left the tables, because it was deleted at the source or because consent
    withholds it, is in none of valid resources and tables; raw and dead letters are as they came.
    """

    def __init__(self, export: Export, resource_type: str, partition_keys: Sequence[str] | None) -> None:
        self._export = export
        self._conn = export.conn
        self._store = export.store
        self._type = resource_type
        self._keys = partition_keys

    def raw(self) -> ExportedFile:
        """``<Type>.raw.ndjson``: every line as it was received. Raises ConfigurationError where consent withholds."""
        self._refuse_what_consent_withholds("raw")
        return self._lines("raw", self._stored("raw"))

    def valid(self) -> ExportedFile:
        """``<Type>.valid.ndjson``: the valid resources as they were received, those that the tables hold."""
        return self._lines("valid", self._in_tables())

    def dead_letters(self) -> ExportedFile:
        """``<Type>.deadletters.ndjson``: each letter with its reason; ``resource`` is the JSON as it came, or text
        where it is none. Of a run: those that failed in it. Raises ConfigurationError where consent withholds.
        """
        self._refuse_what_consent_withholds("dead letters")
        run_id = self._export.run_id
        chosen = Selection(
            run_id=run_id, resource_type=self._type, partition_keys=None if run_id is not None else self._keys
        )
        return self._lines(
            "deadletters", (_as_line(letter, body) for letter, body in dead_letters.stream(self._conn, chosen))
        )

    def table(self, view: View, form: Format) -> ExportedFile:
        """``<view>.<format>``: the rows of a view; what is sealed in the table is sealed in the file."""
        layout = build_layout(view, encrypted=cipher_of(self._conn).on)
        names = [column.name for column in layout.columns]
        rows = row_streams.stream_rows(self._conn, view.name, self._type, columns=names, partition_keys=self._keys)

        def write(path: Path) -> int:
            if form == "parquet":
                return parquet.write(path, layout, rows)
            with path.open("wb") as file:
                if form == "csv":
                    return _write_csv(file, names, rows)
                return _write_lines(file, (_object(names, row) for row in rows))

        return self._export.write(f"{view.name}.{form}", self._type, write)

    def _refuse_what_consent_withholds(self, what: str) -> None:
        if self._export.withholding:
            raise ConfigurationError(
                f"CONSENT_POLICY is on, and {what} hold resources that consent withholds too: export the valid "
                "resources and the tables instead"
            )

    def _stored(self, layer: str) -> Iterator[bytes]:
        keys = self._keys if self._keys is not None else self._store.partition_keys(layer, self._type)
        for key in keys:
            manifest = self._store.manifest(layer, self._type, key)
            if manifest is not None:
                for batch in self._store.batches(manifest.parts):
                    yield from batch

    def _in_tables(self) -> Iterator[bytes]:
        for lines in _chunks(self._stored("validated")):
            ids = [read_header(line).id for line in lines]
            found = self._conn.execute(
                "SELECT id FROM fhir.resource WHERE resource_type = %s AND id = ANY(%s) AND resource IS NOT NULL",
                [self._type, ids],
            )
            there = {resource_id for (resource_id,) in found}
            yield from (line for line, resource_id in zip(lines, ids, strict=True) if resource_id in there)

    def _lines(self, kind: str, lines: Iterable[bytes]) -> ExportedFile:
        def write(path: Path) -> int:
            with path.open("wb") as file:
                return _write_lines(file, lines)

        return self._export.write(f"{self._type}.{kind}.ndjson", self._type, write)


def build_run_folder(run_id: str, at: datetime) -> str:
    """Where the export of a run goes: ``exports/run_<id>_<timestamp>``."""
    return f"exports/run_{run_id}_{at:%Y%m%dT%H%M%SZ}"


def find_run_windows(conn: Connection, run_id: str) -> tuple[str, dict[str, list[str]]]:
    """The whole id of the run that begins so, and the windows it worked on, by resource type. Raises KeyError if there
    is no such run, or several.
    """
    rows = conn.execute(
        "SELECT run_id, resource_type, array_agg(partition_key ORDER BY partition_key) FROM ops.ingestion_runs"
        " WHERE starts_with(run_id, %s) GROUP BY 1, 2",
        [run_id],
    ).fetchall()
    if len({row[0] for row in rows}) != 1:
        raise KeyError(run_id)
    return rows[0][0], {resource_type: keys for _, resource_type, keys in rows}


def _chunks(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == _FETCHED:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _write_lines(file: BinaryIO, lines: Iterable[bytes]) -> int:
    count = 0
    for line in lines:
        file.write(line)
        file.write(b"\n")
        count += 1
    return count


def _write_csv(file: BinaryIO, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """RFC 4180 with a header; JSON and lists are JSON in their cell."""
    count = 0
    with io.TextIOWrapper(file, "utf-8", newline="", write_through=True) as text:
        writer = csv.writer(text)
        writer.writerow(names)
        for row in rows:
            writer.writerow([_cell(value) for value in row])
            count += 1
        text.flush()
    return count


def _cell(value: object) -> object:
    if isinstance(value, dict | list):
        return orjson.dumps(value, default=str).decode()
    return value.isoformat() if isinstance(value, datetime) else value


def _object(names: Sequence[str], row: Sequence[Any]) -> bytes:
    return orjson.dumps(dict(zip(names, row, strict=True)), default=_number)


def _number(value: object) -> float | str:
    return float(value) if hasattr(value, "as_tuple") else str(value)  # type: ignore[arg-type]


def _as_line(letter: dead_letters.StoredDeadLetter, body: bytes | None) -> bytes:
    facts = asdict(letter)
    if body is not None:
        try:
            facts["resource"] = orjson.Fragment(body) if orjson.loads(body) is not None else None
        except orjson.JSONDecodeError:
            facts["resource"] = body.decode("utf-8", "backslashreplace")
    return orjson.dumps(facts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
