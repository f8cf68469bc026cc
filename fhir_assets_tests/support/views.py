"""Small views and resources for tests of the warehouse."""

import json
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec

from fhir_assets.fhir.record import Record, parse_instant
from fhir_assets.fhir.views import CompiledViews, View, parse_view
from fhir_assets.warehouse.postgres.db.connections import Connection, Session
from fhir_assets.warehouse.postgres.tables.copy_blocks import ViewRows
from fhir_assets.warehouse.postgres.tables.loading import LoadCounts, Loader, UnloadableResource
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables

_parse = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode


def column(name: str, path: str, kind: str, **more: Any) -> dict[str, Any]:
    """Return a column of a ViewDefinition. ``index=True`` adds the tag for a database index."""
    tags = more.pop("tag", [{"name": "index", "value": "btree"}] if more.pop("index", False) else [])
    return {"name": name, "path": path, "type": kind, "tag": tags, **more}


def view(name: str, resource_type: str, *columns: dict[str, Any], **select: Any) -> View:
    """Return a view with one select."""
    return parse_view(
        {
            "resourceType": "ViewDefinition",
            "name": name,
            "status": "active",
            "resource": resource_type,
            "description": f"The table {name}",
            "select": [{"column": list(columns), **select}],
        }
    )


PATIENT = view(
    "patient",
    "Patient",
    column("gender", "gender", "code", description="Administrative gender", index=True),
    column("born", "birthDate", "date", index=True),
    column("died", "deceased.ofType(dateTime)", "dateTime"),
    column("active", "active", "boolean"),
    column("birth_order", "multipleBirth.ofType(integer)", "integer"),
    column("updated", "meta.lastUpdated", "instant"),
    column("given", "name.given", "string", collection=True),
)
PATIENT_NAME = view("patient_name", "Patient", column("family", "family", "string", index=True), forEach="name")
PATIENTS = (PATIENT, PATIENT_NAME)


def patient(key: str, updated: str | None = "2024-01-01T00:00:00Z", version: str | None = "1", **more: Any) -> Record:
    """Return the record of a Patient."""
    meta = {name: value for name, value in (("versionId", version), ("lastUpdated", updated)) if value}
    body = json.dumps({"resourceType": "Patient", "id": key, "meta": meta, **more}).encode()
    arrived = parse_instant("2024-01-01T00:00:00+00:00")
    assert isinstance(arrived, datetime)
    return Record("Patient", key, version, parse_instant(updated), arrived, body)


def build_rows(views: tuple[View, ...], record: Record) -> tuple[Record, ViewRows]:
    """Return a record with its rows, as ``Loader.add`` expects it."""
    return record, CompiledViews(views).rows(_parse(record.body))


def load(
    conn: Session, *records: Record, views: tuple[View, ...] = PATIENTS, run_id: str = "run", key: str = "2024-01-01"
) -> tuple[LoadCounts, list[UnloadableResource]]:
    """Create the tables of the views, load the records in one transaction, return counts and failures."""
    ensure_tables(conn, views)
    compiled = CompiledViews(views)
    with conn.transaction():
        loader = Loader(conn, records[0].resource_type, views, run_id=run_id)
        unloadable: list[UnloadableResource] = []
        for record in records:
            unloadable += loader.add([(record, compiled.rows(_parse(record.body)))], key)
        counts = loader.finish()
    return counts, unloadable + loader.take_unloadable()


def select(conn: Connection, query: str) -> list[tuple[Any, ...]]:
    """Return all rows of a query."""
    return conn.execute(query.encode()).fetchall()
