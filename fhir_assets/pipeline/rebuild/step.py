"""Fills changed tables of views from ``fhir.resource``, while loads run.

When a view changes, the rows of its resource type are outdated. This step rebuilds them in batches, each in a
transaction of its own. If it is stopped, or if a resource no longer yields rows, the parts of the type count as not
loaded: the next load of each window writes their rows, or a dead letter.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import psycopg

from fhir_assets.errors import DatabaseUnavailable, EncryptionError
from fhir_assets.fhir.views import View
from fhir_assets.pipeline.load.row_builder import RowBuilder
from fhir_assets.pipeline.load.stored_rows import build_stored_rows
from fhir_assets.warehouse.ops import checkpoints
from fhir_assets.warehouse.postgres.db.connections import OpenSession, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import decrypt_resource
from fhir_assets.warehouse.postgres.tables import rebuilding, view_tables


@dataclass(frozen=True, slots=True)
class RebuildProgress:
    """The progress of one resource type: the number of resources whose rows were rebuilt, and the total."""

    resource_type: str
    done: int
    total: int


@dataclass(slots=True)
class RebuildResult:
    """The numbers of resources by type whose rows were rebuilt, and whose rows could not be rebuilt."""

    rebuilt: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)


class RebuildStep:
    """Brings the tables of ``views``, which are all views of the deployment, up to date with their definitions."""

    def __init__(
        self,
        connect: OpenSession,
        views: Sequence[View],
        *,
        on_progress: Callable[[RebuildProgress], None] = lambda progress: None,
    ) -> None:
        self._connect = connect
        self._views = views
        self._views_by_type = defaultdict[str, list[View]](list)
        for view in views:
            self._views_by_type[view.resource_type].append(view)
        self._on_progress = on_progress

    def run(self, *, drop_columns: bool = False, cascade: bool = False) -> RebuildResult:
        """Change the tables and rebuild the rows that become outdated.

        ``drop_columns`` and ``cascade`` allow changes that lose data, as in ``view_tables.apply_changes``. Raises
        ViewError, ConfigurationError or DatabaseUnavailable.
        """
        result = RebuildResult()
        with self._connect() as conn:
            parts = checkpoints.read_loaded_parts(conn)
            if drop_columns:
                changes = view_tables.apply_changes(conn, self._views, cascade=cascade)
            else:
                changes = view_tables.ensure_tables(conn, self._views)
            # A rebuild that was killed has left types outdated, whose tables are not changed any more.
            outdated = sorted(
                {*changes.outdated_types, *view_tables.find_outdated_types(conn)} & {*self._views_by_type}
            )
            conn.commit()
            try:
                for resource_type in outdated:
                    self._rebuild_type(conn, resource_type, parts.get(resource_type, []), result)
            except psycopg.OperationalError as error:
                raise DatabaseUnavailable(
                    f"Postgres ended the rebuild of changed tables ({type(error).__name__}): the tables are changed; "
                    "run `fhir-assets migrate` again, which writes the rows that are left"
                ) from None
        return result

    def _rebuild_type(
        self, conn: Session, resource_type: str, parts: Sequence[checkpoints.LoadedPartRow], result: RebuildResult
    ) -> None:
        """Rebuild the rows of a type, and mark its parts as loaded again if none is missing."""
        refused = 0
        for done, total, refused_in_batch in self._rebuild(conn, resource_type):
            refused += refused_in_batch
            result.rebuilt[resource_type] = done - refused
            self._on_progress(RebuildProgress(resource_type, done, total))
        if refused:
            result.refused[resource_type] = refused
        else:
            checkpoints.restore_loaded_parts(conn, parts)
        view_tables.mark_up_to_date(conn, resource_type)
        conn.commit()

    def _rebuild(self, conn: Session, resource_type: str) -> Iterator[tuple[int, int, int]]:
        """Rebuild the rows of a type.

        Yield after each batch: resources processed, total, and refused ones of the batch.
        """
        total = rebuilding.count_resources(conn, resource_type)
        if not total:
            return
        views = self._views_by_type[resource_type]
        row_builder = RowBuilder(views, cipher_of(conn), conn.source)
        after, done = "", 0
        while ids := rebuilding.find_next_ids(conn, resource_type, after):
            conn.commit()
            refused = self._rebuild_batch(conn, resource_type, row_builder, ids)
            after = ids[-1]
            done += len(ids)
            yield done, max(done, total), refused
        conn.commit()
        rebuilding.analyze(conn, views)
        conn.commit()

    def _rebuild_batch(self, conn: Session, resource_type: str, row_builder: RowBuilder, ids: Sequence[str]) -> int:
        """Rebuild the rows of a batch of resources. Return the number of resources whose rows could not be rebuilt."""
        refused = 0
        with conn.transaction():
            readable, bodies = [], []
            for resource_id, key_id, text in rebuilding.lock_bodies(conn, resource_type, ids):
                try:
                    bodies.append(decrypt_resource(conn, resource_type, resource_id, text, key_id))
                except EncryptionError:
                    refused += 1
                    continue
                readable.append(resource_id)
            built = build_stored_rows(conn, resource_type, row_builder, readable, bodies)
            try:
                with conn.transaction():
                    rebuilding.replace_rows(conn, self._views_by_type[resource_type], built.block)
            except psycopg.DataError:
                return len(ids)
        return refused + len(built.rejected)
