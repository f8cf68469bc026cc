"""Updates of the lake: the tables of views as Parquet files, without windows that do not reconcile."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager

from fhir_assets.fhir.views import View
from fhir_assets.pipeline.reconcile.verdicts import evaluate_unreconciled_windows
from fhir_assets.pipeline.reconcile.window_counts import find_main_view, list_windows
from fhir_assets.storage.blobs import Blobs
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.lake.writer import LakeUpdate
from fhir_assets.warehouse.postgres.db.connections import Session
from fhir_assets.warehouse.postgres.tables import view_tables


class LakeStep:
    """Updates the folders of views in the lake at ``target``. ``views`` are all views of the deployment.

    Call ``ConsentStep`` first, so that the tables follow decisions that are due.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[Session]],
        store: Store,
        target: Blobs,
        views: Sequence[View],
        *,
        run_id: str,
        actor: str,
    ) -> None:
        self._connect = connect
        self._store = store
        self._target = target
        self._views = views
        self._run_id = run_id
        self._actor = actor

    def run(
        self, resource_type: str, views: Sequence[View], partition_keys: Collection[str] = ()
    ) -> Iterator[tuple[View, LakeUpdate]]:
        """Update the folders of ``views``, which are views of one resource type. Yield each view with its update.

        The windows ``partition_keys`` are always written, other windows if their rows changed. Raises StoreError.
        """
        main_view = find_main_view(self._views, resource_type)
        with self._connect() as conn:
            view_tables.ensure_tables(conn, views)
            conn.commit()
            keys = list_windows(self._store, resource_type)
            evaluate_unreconciled_windows(conn, self._store, resource_type, keys, main_view=main_view)
            for view in views:
                yield (
                    view,
                    writer.update(conn, self._target, view, partition_keys, run_id=self._run_id, actor=self._actor),
                )
