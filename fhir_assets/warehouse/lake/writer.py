"""The lake: Parquet files with the rows of a view, ``<view>/partition_key=<window>/rows.parquet``.

A view without rows has one file without rows, so that its columns can be read.

A newer version of a resource can move its rows to another window, and a deletion or a withdrawn consent removes rows.
An update therefore rewrites every window whose rows changed since its file was written, not only those of its run.

Windows that do not reconcile (``ops.window_verdicts``) are held back: they get no file, and their earlier file stays
while the table still has all of its rows. A file with rows that the table no longer has is deleted, because consent may
have been withdrawn for them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psycopg
from psycopg import sql

from fhir_assets.errors import StoreError
from fhir_assets.fhir.views import View
from fhir_assets.foreign_errors import choose_store_error
from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.storage.blobs import Blobs
from fhir_assets.storage.orphans import remove_unfinished_files
from fhir_assets.warehouse.exports import parquet
from fhir_assets.warehouse.ops import audit_log, window_verdicts
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.tables import row_streams
from fhir_assets.warehouse.postgres.tables.layout import TableLayout, build_layout

_STATES = "_state"
"""The folder with a state file for each view. The folder of a view contains only Parquet files, as Polars requires."""

_EARLIER_STATE = "_windows.json"
"""The name of the state file of earlier versions, in the folder of its view."""

_NO_WINDOW = "__HIVE_DEFAULT_PARTITION__"
"""The window of the file of a view without rows: Hive's name of the partition for null."""

_FORM = "2"
"""The version of the file format. Files of another version are written again: version 1 had doubles for decimals."""


class _FileState(msgspec.Struct, frozen=True):
    """The state of a window's rows at the time when its file was written.

    ``rows`` is their number, ``written_by`` the sum of the ids of the transactions that wrote them, ``shape`` the hash
    of the table's layout, and ``snapshot`` the transactions whose rows were visible.
    """

    rows: int
    written_by: str | None = None
    shape: str = ""
    snapshot: str = ""

    def has_rows_of(self, other: "_FileState | None") -> bool:
        """Return whether both states describe the same rows."""
        return other is not None and (self.rows, self.written_by, self.shape) == (
            other.rows,
            other.written_by,
            other.shape,
        )


_decoder = msgspec.json.Decoder(dict[str, _FileState])


@dataclass(frozen=True, slots=True)
class LakeUpdate:
    """The result of an update of a view's folder: written and removed windows, and the rows and bytes written.

    ``held`` has the reason for each window that was held back.
    """

    windows: int = 0
    removed: int = 0
    rows: int = 0
    bytes: int = 0
    held: Mapping[str, str] = field(default_factory=dict)


def update(
    conn: Session, target: Blobs, view: View, partition_keys: Collection[str], *, run_id: str, actor: str
) -> LakeUpdate:
    """Write the windows ``partition_keys`` of a view, and all other windows whose rows changed.

    All files are written from one snapshot of the database, and each is replaced atomically. If the update fails, the
    files that it has written have their audit record. Raises StoreError.
    """

    def record(rows: int) -> None:
        # The audit record needs a transaction of its own, because the snapshot does not see the newest audit records.
        with conn.transaction():
            audit_record = AuditRecord(
                "export", actor, view.resource_type, count=rows, run_id=run_id, detail={"file": "lake"}
            )
            audit_log.record(conn, audit_record)

    lock = f"fhir_assets lake {view.name}"
    conn.commit()
    conn.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [lock])
    conn.commit()
    try:
        remove_unfinished_files(target)
        folder = LakeFolder(conn, target, view)
        try:
            with conn.transaction():
                conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                written = folder.update(partition_keys)
        except Exception:
            with suppress(psycopg.Error):
                record(folder.rows_written)
            raise
        if written.windows:
            # The record precedes the state, so that files without an audit record are written again.
            record(written.rows)
        folder.save_state()
    finally:
        target.remove_spool()
        conn.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [lock])
        conn.commit()
    return written


class LakeFolder:
    """The folder of one view in the lake. Callers must hold the lock and the transaction of ``update``."""

    def __init__(self, conn: Session, target: Blobs, view: View) -> None:
        self._conn = conn
        self._target = target
        self._view = view
        self._layout: TableLayout = build_layout(view, encrypted=cipher_of(conn).encrypts)
        self._states: dict[str, _FileState] = {}
        self._saved: dict[str, _FileState] = {}
        self.rows_written = 0
        """The number of rows in the files that have been written so far."""

    def update(self, partition_keys: Collection[str]) -> LakeUpdate:
        """Write the given windows and those whose rows changed, and delete the files of windows without rows."""
        before = self._load_state()
        states = self._read_states()
        removed = [key for key in before if key not in states and key != _NO_WINDOW]
        outdated = [
            key for key, state in states.items() if key in partition_keys or not state.has_rows_of(before.get(key))
        ]
        held = window_verdicts.find_faults(self._conn, self._view.resource_type, outdated)
        for key in held:
            file = before.get(key)
            del states[key]
            if file is not None and self._has_all_rows(key, file):
                states[key] = file
            elif file is not None:
                removed.append(key)
        outdated = [key for key in outdated if key not in held]
        if new := [key for key in outdated if key not in before]:
            # The state names new windows before their files exist. If this process is killed and consent is withdrawn
            # in the meantime, the next update finds a window without rows in the state, and deletes its file.
            self._put_state({**before, **dict.fromkeys(new, _FileState(0))})
        size = 0
        for key in sorted(outdated):
            size += self.write_window(key, states[key].rows)
            self.rows_written += states[key].rows
        if not states:
            size += self._write_columns(states, before)
        elif _NO_WINDOW in before:
            self._target.delete(self._path(_NO_WINDOW))
        for key in removed:
            self._target.delete(self._path(key))
        self._states = states
        return LakeUpdate(len(outdated), len(removed), self.rows_written, size, held)

    def _write_columns(self, states: dict[str, _FileState], before: Mapping[str, _FileState]) -> int:
        """Write a file without rows unless the folder has one. Add it to ``states``, and return the bytes written."""
        states[_NO_WINDOW] = _FileState(0, shape=self._shape)
        return 0 if states[_NO_WINDOW].has_rows_of(before.get(_NO_WINDOW)) else self.write_window(_NO_WINDOW, 0)

    def _has_all_rows(self, key: str, file: _FileState) -> bool:
        """Return whether the table still has all rows of a window's file, as they were written."""
        if not file.snapshot:
            return False
        query = sql.SQL("""
            SELECT count(*)
            {source}
                AND r.partition_key = %(key)s
                AND pg_visible_in_snapshot(
                    (pg_current_xact_id()::text::bigint - age(v.xmin))::text::xid8, %(snapshot)s::pg_snapshot
                )
        """).format(source=row_streams.join_resources(self._layout))
        parameters = {"type": self._view.resource_type, "key": key, "snapshot": file.snapshot}
        row = self._conn.execute(query, parameters).fetchone()
        return row is not None and row[0] == file.rows

    def save_state(self) -> None:
        """Save the state of the files, so that unchanged windows are not written again."""
        if self._states != self._saved:
            self._put_state(self._states)

    def _load_state(self) -> dict[str, _FileState]:
        """Return the state of the files that an earlier update wrote, of this or an earlier version."""
        if content := self._target.get(self._state_path):
            self._saved = _decoder.decode(content)
            return self._saved
        return _decoder.decode(self._target.get(self._earlier_state_path) or b"{}")

    def _put_state(self, states: dict[str, _FileState]) -> None:
        self._target.put(self._state_path, msgspec.json.encode(states))
        self._saved = states
        # An earlier version wrote the state to the folder of the windows, where readers mistake it for a table.
        self._target.delete(self._earlier_state_path)

    @property
    def _state_path(self) -> str:
        return f"{_STATES}/{self._view.name}.json"

    @property
    def _earlier_state_path(self) -> str:
        return f"{self._view.name}/{_EARLIER_STATE}"

    @property
    def _shape(self) -> str:
        return f"{self._layout.shape}/{_FORM}"

    def _read_states(self) -> dict[str, _FileState]:
        # xmin is the id of the transaction that wrote a row. Every transaction that replaces rows changes the sum.
        query = sql.SQL("""
            SELECT r.partition_key, count(*), sum(v.xmin::text::bigint)::text, pg_current_snapshot()::text
            {source}
            GROUP BY 1
        """).format(source=row_streams.join_resources(self._layout))
        rows_by_window = self._conn.execute(query, {"type": self._view.resource_type}).fetchall()
        return {
            key: _FileState(rows, written_by, self._shape, snapshot)
            for key, rows, written_by, snapshot in rows_by_window
        }

    def write_window(self, key: str, expected: int) -> int:
        """Write the file of one window, which has ``expected`` rows. Return its size in bytes. Raises StoreError."""
        path = self._target.create_spooled(".parquet")
        try:
            rows = parquet.write(path, self._layout, self._stream_rows(key))
            if rows != expected:
                raise StoreError(
                    f"{self._path(key)} of the lake would have {rows:,} rows and its table {expected:,}: check the "
                    "table with `fhir-assets reconcile`, then materialize the asset again"
                )
            size = path.stat().st_size
            self._target.put_file(self._path(key), path)
        except OSError as error:
            raise choose_store_error(error)(
                f"cannot write {self._path(key)} of the lake: {error.strerror or type(error).__name__}. Free space or "
                "correct the permissions there, then materialize the asset again"
            ) from None
        finally:
            path.unlink(missing_ok=True)
        return size

    def _stream_rows(self, key: str) -> Iterator[Sequence[Any]]:
        columns = [column.name for column in self._layout.readable_columns]
        return row_streams.stream_rows(self._conn, self._layout, columns=columns, partition_keys=[key])

    def _path(self, key: str) -> str:
        return f"{self._view.name}/partition_key={key}/rows.parquet"
