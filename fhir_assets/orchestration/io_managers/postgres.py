"""The IO manager ``postgres``: describes tables that a step has loaded, and streams their rows to downstream steps.

It writes no rows: ``pipeline.load`` commits all views of a resource type in one transaction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dagster as dg
from psycopg.rows import TupleRow

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.fhir.views import View
from fhir_assets.orchestration.window_materializations import log_window_materializations
from fhir_assets.orchestration.window_metadata import ROW_COUNT, add_window_metadata
from fhir_assets.warehouse.postgres.db.connections import cipher_of
from fhir_assets.warehouse.postgres.tables import row_streams
from fhir_assets.warehouse.postgres.tables.layout import build_layout


@dataclass(frozen=True, slots=True)
class LoadedView:
    """A table that a step has loaded and committed."""

    table: str
    written: int
    """The number of rows that the step wrote."""
    rows: int
    """The number of rows that the table has now."""


@dataclass(frozen=True, slots=True)
class TableSlice:
    """The rows of a table whose resources belong to some partitions."""

    warehouse: Warehouse
    view: View
    partition_keys: Sequence[str]

    def rows(self) -> Iterator[TupleRow]:
        """Yield the rows through a server-side cursor, in no particular order."""
        with self.warehouse.connect() as conn:
            layout = build_layout(self.view, encrypted=cipher_of(conn).encrypts)
            yield from row_streams.stream_rows(conn, layout, partition_keys=self.partition_keys)


class PostgresIOManager(dg.IOManager):
    """Describes the LoadedView that a step outputs, and gives downstream steps a TableSlice of the run's partitions."""

    def __init__(self, warehouse: Warehouse, views: Sequence[View]) -> None:
        self._warehouse = warehouse
        self._views = {view.name: view for view in views}

    def handle_output(self, context: dg.OutputContext, obj: LoadedView) -> None:
        """Add the row count of the table to the materialization of the run's last window.

        The count covers the whole table, not only the window.
        """
        keys = context.asset_partition_keys
        metadata = {"run_rows_written": obj.written, ROW_COUNT: obj.rows}
        add_window_metadata(context.step_context, context.asset_key, {key: {} for key in keys} | {keys[-1]: metadata})
        log_window_materializations(context)

    def load_input(self, context: dg.InputContext) -> TableSlice:
        """Return the table of the upstream asset, restricted to the partitions of the run."""
        name = context.asset_key.path[-1]
        return TableSlice(self._warehouse, self._views[name], context.asset_partition_keys)
