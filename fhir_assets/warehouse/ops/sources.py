"""``ops.sources`` and ``ops.deployment``: the settings to which a source is bound, and the id of the store."""

from collections.abc import Mapping
from dataclasses import dataclass

from psycopg.types.json import Jsonb

from fhir_assets.warehouse.postgres.db.connections import Connection


@dataclass(frozen=True, slots=True)
class StoreLink:
    """The ids of a database and of its store. ``confirmed`` is True if the marker of the store names both."""

    database_id: str
    store_id: str
    confirmed: bool


def read_settings(conn: Connection, source: str) -> dict[str, str] | None:
    """Return the bound settings of a source by name, or None before its first load."""
    row = conn.execute("SELECT settings FROM ops.sources WHERE source = %s", [source]).fetchone()
    return row[0] if row else None


def add_settings(conn: Connection, source: str, settings: Mapping[str, str]) -> None:
    """Bind settings of a source that are not bound yet. Settings that are bound keep their values."""
    conn.execute(
        """
        INSERT INTO ops.sources AS bound (source, settings)
        VALUES (%s, %s)
        ON CONFLICT (source) DO UPDATE SET
            settings = excluded.settings || bound.settings
        """,
        [source, Jsonb(dict(settings))],
    )


def replace_settings(conn: Connection, source: str, settings: Mapping[str, str]) -> None:
    """Bind other settings of a source."""
    conn.execute(
        """
        INSERT INTO ops.sources (source, settings)
        VALUES (%s, %s)
        ON CONFLICT (source) DO UPDATE SET
            settings = excluded.settings,
            changed_at = now()
        """,
        [source, Jsonb(dict(settings))],
    )


def read_link(conn: Connection) -> StoreLink | None:
    """Return the ids of the database and of its store, or None before the first load."""
    row = conn.execute("SELECT database_id::text, store_id::text, store_confirmed FROM ops.deployment").fetchone()
    return StoreLink(*row) if row else None


def create_link(conn: Connection) -> StoreLink:
    """Give the database and its store an id unless they have one, and return them."""
    conn.execute("INSERT INTO ops.deployment DEFAULT VALUES ON CONFLICT DO NOTHING")
    link = read_link(conn)
    assert link is not None
    return link


def record_store(conn: Connection, store_id: str) -> None:
    """Record that the marker of the store with this id names the database."""
    conn.execute("UPDATE ops.deployment SET store_id = %s, store_confirmed = true", [store_id])
