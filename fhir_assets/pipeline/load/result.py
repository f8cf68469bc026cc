"""What a load did: its counts over all of its windows."""

from collections import Counter
from dataclasses import dataclass, field

from fhir_assets.warehouse.postgres.tables.view_tables import NewWindow


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The counts of a load over all of its windows."""

    resources: int = 0
    inserted: int = 0
    updated: int = 0
    superseded: int = 0
    """Resources that were not loaded because the tables have a newer version."""
    withheld: int = 0
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Written rows by partition key and view name."""
    written: Counter[str] = field(default_factory=Counter)
    """The resources with these rows, by partition key."""
    dead_by_rule: Counter[str] = field(default_factory=Counter)
    """Dead letters by rule."""
    resolved_windows: frozenset[str] = frozenset()
    """Keys of windows whose dead letters were resolved by newer versions; they may be windows of other loads."""

    def __add__(self, other: "LoadResult") -> "LoadResult":
        return LoadResult(
            self.resources + other.resources,
            self.inserted + other.inserted,
            self.updated + other.updated,
            self.superseded + other.superseded,
            self.withheld + other.withheld,
            self.rows + other.rows,
            self.written + other.written,
            self.dead_by_rule + other.dead_by_rule,
            self.resolved_windows | other.resolved_windows,
        )

    def count_rows_by_view(self) -> Counter[str]:
        """Return the written rows by view name."""
        total: Counter[str] = Counter()
        for (_, view), rows in self.rows.items():
            total[view] += rows
        return total

    def find_new_windows(self) -> dict[str, NewWindow]:
        """Return what was written of each window, by its key; nothing if some of it replaced stored resources."""
        if self.updated:
            return {}
        rows: dict[str, dict[str, int]] = {key: {} for key in self.written}
        for (key, view), count in self.rows.items():
            rows[key][view] = count
        return {key: NewWindow(resources, rows[key]) for key, resources in self.written.items()}
