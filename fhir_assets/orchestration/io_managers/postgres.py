"""Tables as Dagster sees them: what was loaded is described, what is read downstream is streamed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dagster as dg
from psycopg.rows import TupleRow

from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.warehouse.postgres.tables import row_streams


@dataclass(frozen=True, slots=True)
class LoadedView:
    """What a load did to one table, already committed: ``written`` rows; the table has ``rows`` now."""

    table: str
    written: int
    rows: int


@dataclass(frozen=True, slots=True)
class TableSlice:
    """The rows of a view whose resources belong to some partitions."""

    warehouse: Warehouse
    table: str
    resource_type: str
    partition_keys: Sequence[str]

    def rows(self) -> Iterator[TupleRow]:
        """The rows, streamed through a server-side cursor, in no particular order."""
        with self.warehouse.connect() as conn:
            yield from row_streams.stream(conn, self.table, self.resource_type, partition_keys=self.partition_keys)


class PostgresIOManager(dg.IOManager):
    """An output is a LoadedView: the load committed it together with the type's other views, in one transaction.
    An input is a TableSlice of the run's partitions.
    """

    def __init__(self, warehouse: Warehouse, resource_types: dict[str, str]) -> None:
        self._warehouse = warehouse
        self._resource_types = resource_types

    def handle_output(self, context: dg.OutputContext, obj: LoadedView) -> None:
        """Describe the table."""
        context.add_output_metadata(
            {
                "rows_written": obj.written,
                "dagster/row_count": obj.rows,
                "dagster/relation_identifier": f"fhir.{obj.table}",
            }
        )

    def load_input(self, context: dg.InputContext) -> TableSlice:
        """The table, restricted to the partitions of the run."""
        name = context.asset_key.path[-1]
        return TableSlice(self._warehouse, name, self._resource_types[name], context.asset_partition_keys)
