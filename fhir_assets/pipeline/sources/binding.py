"""The binding of a source to settings: the settings with which its windows, checkpoints and partitions were made.

A load with other settings would misread that state: windows of another length would count as complete, and resources of
another server as already loaded. It is therefore refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from uuid import uuid4

from fhir_assets.errors import ConfigurationError
from fhir_assets.sources import DEFAULT_SOURCE
from fhir_assets.storage.marker import StoreMarker, read_marker, write_marker
from fhir_assets.storage.store import Store
from fhir_assets.warehouse.ops import sources
from fhir_assets.warehouse.ops.sources import StoreLink
from fhir_assets.warehouse.postgres.db.connections import Connection, OpenSession
from fhir_assets.windows import WindowScheme

REMEDY = (
    "either restore the old value, or choose: `fhir-assets sources carry-over` keeps what is loaded, and "
    "`fhir-assets sources start-anew` removes it and loads the source again"
)


class Effect(StrEnum):
    """What a setting determines, and therefore what becomes invalid when its value changes."""

    WINDOWS = "windows"
    """The length of windows: partitions have other boundaries."""
    START = "start"
    """The start of the first window: older resources are not loaded."""
    SERVER = "server"
    """The server that resources come from."""
    COVERAGE = "coverage"
    """The subset of the server's resources that a fetch returns."""


_OF_RECEIVED = frozenset({Effect.WINDOWS, Effect.START})
"""Effects on resources that do not come from the configured source."""


@dataclass(frozen=True, slots=True)
class BoundSetting:
    """The current value of a setting on which the state of a source depends; an empty text if it is unset."""

    name: str
    value: str
    effect: Effect


@dataclass(frozen=True, slots=True)
class Change:
    """A setting whose current value differs from the bound value."""

    setting: BoundSetting
    bound: str

    def __str__(self) -> str:
        old, new = self.bound or "unset", self.setting.value or "unset"
        return f"{self.setting.name} was {old} when the source was loaded, and is {new} now"


class SourceBinding:
    """Compares the settings of a deployment with those to which the state of a source is bound.

    ``labels`` are the settings that select the store and the database, for messages.
    """

    def __init__(
        self,
        settings: Sequence[BoundSetting],
        connect: OpenSession,
        store: Store,
        scheme: WindowScheme,
        *,
        source: str = DEFAULT_SOURCE,
        labels: str,
    ) -> None:
        self.source = source
        self.settings = tuple(settings)
        self.scheme = scheme
        self._connect = connect
        self.store = store
        self._labels = labels
        self._marker: StoreMarker | None = None

    def require(self, *, fetches: bool = False) -> None:
        """Raise ConfigurationError, at the beginning of a load, if the state of the source belongs to other settings.

        The message names the settings that changed and both ways to continue. Settings that are not bound yet are
        bound; those of the server only if the load ``fetches`` from it. Raises StoreError.
        """
        with self._connect() as conn:
            bound = sources.read_settings(conn, self.source) or {}
            current = {item.name: item.value for item in self.settings if fetches or item.effect in _OF_RECEIVED}
            link, problem = self._find_store_problem(conn)
            self._refuse(self.compare(bound), problem)
            if link is None or not link.confirmed or current.keys() - bound.keys():
                self._refuse(self.compare(self._bind(conn, current)), [])

    def compare(self, bound: Mapping[str, str]) -> list[Change]:
        """Return the settings whose values differ from the bound values in a way that matters."""
        return [
            Change(item, bound[item.name])
            for item in self.settings
            if item.name in bound and not self._is_same(item, bound[item.name])
        ]

    def find_changes(self, conn: Connection) -> tuple[list[Change], list[str]]:
        """Return the settings that changed, and the problem with the pair of store and database, if any."""
        self._marker = read_marker(self.store)
        of_store = self._marker.sources.get(self.source, {}) if self._marker else {}
        of_database = sources.read_settings(conn, self.source) or {}
        changes = {change.setting.name: change for bound in (of_store, of_database) for change in self.compare(bound)}
        return list(changes.values()), self._find_store_problem(conn)[1]

    def rebind(self, conn: Connection) -> None:
        """Bind the current settings, and assign the store to this database. Commits."""
        link = sources.create_link(conn)
        conn.commit()
        marker = read_marker(self.store)
        values = self._values
        others = marker.sources if marker else {}
        store_id = marker.id if marker else str(uuid4())
        write_marker(self.store, StoreMarker(store_id, link.database_id, {**others, self.source: values}))
        sources.replace_settings(conn, self.source, values)
        sources.record_store(conn, store_id)
        conn.commit()
        self._marker = None

    @cached_property
    def _values(self) -> dict[str, str]:
        return {item.name: item.value for item in self.settings}

    def _is_same(self, item: BoundSetting, bound: str) -> bool:
        if item.value == bound:
            return True
        if item.effect is Effect.START and item.value and bound:
            floor = self.scheme.granularity.floor
            return floor(datetime.fromisoformat(item.value)) == floor(datetime.fromisoformat(bound))
        return False

    def _refuse(self, changes: Sequence[Change], problem: Sequence[str]) -> None:
        """Raise ConfigurationError if there is a change or a problem."""
        if changes or problem:
            raise ConfigurationError(
                f"The settings of source {self.source} changed: {'; '.join([*map(str, changes), *problem])}. "
                f"Its windows and checkpoints belong to the old value: {REMEDY}"
            )

    def _bind(self, conn: Connection, current: Mapping[str, str]) -> Mapping[str, str]:
        """Bind settings for the first time, and return the bound settings, because another process may have bound them
        first.

        The marker is written between two commits, so that a crash is harmless.
        """
        sources.add_settings(conn, self.source, current)
        link = sources.create_link(conn)
        conn.commit()
        bound = sources.read_settings(conn, self.source) or {}
        marker = read_marker(self.store) or StoreMarker(link.store_id, link.database_id)
        self._marker = StoreMarker(marker.id, marker.database, {**marker.sources, self.source: bound})
        write_marker(self.store, self._marker)
        sources.record_store(conn, self._marker.id)
        conn.commit()
        return bound

    def _find_store_problem(self, conn: Connection) -> tuple[StoreLink | None, list[str]]:
        """Return the link of the database, and a message if the store and the database do not belong together.

        A problem is confirmed by a second read, because another process may bind both between the reads of the first.
        """
        for _ in range(2):
            link = sources.read_link(conn)
            if self._marker is None:
                self._marker = read_marker(self.store)
            problem = self._compare_pair(link)
            if not problem:
                break
            self._marker = None
        return link, problem

    def _compare_pair(self, link: StoreLink | None) -> list[str]:
        marker, url = self._marker, self.store.blobs.url
        if marker is None:
            if link is None or not link.confirmed:
                return []
            return [
                f"the database belongs to the store with id {link.store_id}, and {url} is not that store: it has no "
                f"store.json (see {self._labels})"
            ]
        if link is not None and (marker.id, marker.database) == (link.store_id, link.database_id):
            return []
        ours = f"database {link.database_id} with store {link.store_id}" if link else "a database without any load"
        return [
            f"the store {url} has id {marker.id} and belongs to database {marker.database}, but this is {ours} "
            f"(see {self._labels})"
        ]
