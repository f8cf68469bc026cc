"""The lake: the rows of a view as Parquet, ``<view>/partition_key=<window>/rows.parquet``, kept equal to its table.

A row moves to another window with a newer version of its resource, and goes with a deletion or a withdrawn consent. So
every window whose rows changed since its file was written is written anew, whichever run asks.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from psycopg import sql

from fhir_assets.errors import StoreError
from fhir_assets.fhir.views import View
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.storage.blobs import Blobs
from fhir_assets.warehouse.exports import parquet
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.tables import row_streams
from fhir_assets.warehouse.postgres.tables.layout import TableLayout, build_layout

_STATE = "_windows.json"
"""Names that begin with an underscore are no data to Spark, Trino and Hive."""


class _Window(msgspec.Struct, frozen=True):
    """What a file holds: how many rows, the sum of the transactions that wrote them, the shape of the table then."""

    rows: int
    written_by: str | None = None
    shape: str = ""


_decoder = msgspec.json.Decoder(dict[str, _Window])


@dataclass(frozen=True, slots=True)
class LakeUpdate:
    """What an update of a view's folder did: windows written and removed, rows and bytes of those written."""

    windows: int = 0
    removed: int = 0
    rows: int = 0
    bytes: int = 0


def update(conn: Session, target: Blobs, view: View, wanted: Collection[str], *, run_id: str, actor: str) -> LakeUpdate:
    """Write the ``wanted`` windows of a view, and all others that are no longer what their table holds.

    Each file is replaced in one step, all from one snapshot of the database. Raises StoreError.
    """
    lock = f"fhir_assets lake {view.name}"
    conn.commit()
    conn.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [lock])
    conn.commit()
    try:
        with conn.transaction():
            conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            lake = LakeFolder(conn, target, view)
            written = lake.update(wanted)
        # Not in the same transaction: its snapshot is older than the last record of the log. But before the files count
        # as written, so that those which are not on record are written again.
        with conn.transaction():
            audit_record = AuditRecord(
                "export", actor, view.resource_type, count=written.rows, run_id=run_id, detail={"file": "lake"}
            )
            audit_log.record(conn, audit_record)
        lake.remember(written)
    finally:
        conn.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [lock])
        conn.commit()
    return written


class LakeFolder:
    """The folder of one view."""

    def __init__(self, conn: Session, target: Blobs, view: View) -> None:
        self._conn = conn
        self._target = target
        self._view = view
        self._layout: TableLayout = build_layout(view, encrypted=cipher_of(conn).on)
        self._now: dict[str, _Window] = {}

    def update(self, wanted: Collection[str]) -> LakeUpdate:
        before = _decoder.decode(self._target.get(f"{self._view.name}/{_STATE}") or b"{}")
        now = self._windows()
        gone = [key for key in before if key not in now]
        stale = [key for key, window in now.items() if key in wanted or before.get(key) != window]
        size = sum(self.write_window(key) for key in sorted(stale))
        for key in gone:
            self._target.delete(self._name(key))
        self._now = now
        return LakeUpdate(len(stale), len(gone), sum(now[key].rows for key in stale), size)

    def remember(self, written: LakeUpdate) -> None:
        """What was written holds."""
        if written.windows or written.removed:
            self._target.put(f"{self._view.name}/{_STATE}", msgspec.json.encode(self._now))

    def _windows(self) -> dict[str, _Window]:
        # xmin is the transaction that wrote a row: whatever replaces rows (loads, deletions, other keys) changes it.
        query = sql.SQL("SELECT r.partition_key, count(*), sum(v.xmin::text::bigint)::text {} GROUP BY 1").format(
            row_streams.join_resources(self._view.name)
        )
        found = self._conn.execute(query, {"type": self._view.resource_type}).fetchall()
        return {key: _Window(rows, written_by, self._layout.shape) for key, rows, written_by in found}

    def write_window(self, key: str) -> int:
        path = self._target.spool() / f"{os.urandom(8).hex()}.parquet"
        try:
            parquet.write(path, self._layout, self._rows(key))
            size = path.stat().st_size
            self._target.put_file(self._name(key), path)
        except OSError as error:
            raise StoreError(
                f"cannot write {self._name(key)} of the lake: {error.strerror or type(error).__name__}. Free space or "
                "mend the rights there, then materialize it again"
            ) from None
        finally:
            path.unlink(missing_ok=True)
        return size

    def _rows(self, key: str) -> Iterator[Sequence[Any]]:
        columns = [column.name for column in self._layout.columns]
        view = self._view
        return row_streams.stream_rows(self._conn, view.name, view.resource_type, columns=columns, partition_keys=[key])

    def _name(self, key: str) -> str:
        return f"{self._view.name}/partition_key={key}/rows.parquet"
