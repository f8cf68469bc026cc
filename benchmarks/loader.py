"""Measure the loader: small Observations with all of their shipped views, into an embedded Postgres.

``python -m benchmarks.loader [resources]`` prints a table.
"""

import gc
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from fhir_assets.fhir.record import Record
from fhir_assets.fhir.views import CompiledViews, View, load_views
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.warehouse.postgres.db import embedded, migrations, schema_state
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets.warehouse.postgres.tables.copy_blocks import ViewRows
from fhir_assets.warehouse.postgres.tables.encoding import build_row_encoder
from fhir_assets.warehouse.postgres.tables.loading import Loader
from fhir_assets.warehouse.postgres.tables.view_tables import ensure_tables

CATEGORIES = "http://terminology.hl7.org/CodeSystem/observation-category"
BATCH = 1000
START = datetime(2024, 1, 1, tzinfo=UTC)


def observation(number: int) -> Record:
    """Return a blood pressure with two components."""
    moment = START + timedelta(seconds=number)
    quantity = {"unit": "mm[Hg]", "system": "http://unitsofmeasure.org", "code": "mm[Hg]"}
    resource = {
        "resourceType": "Observation",
        "id": f"{(number * 2654435761) % 2**32:08x}-{number}",
        "meta": {"versionId": "1", "lastUpdated": moment.isoformat()},
        "status": "final",
        "category": [{"coding": [{"system": CATEGORIES, "code": "vital-signs"}]}],
        "code": {"coding": [{"system": "http://loinc.org", "code": "85354-9", "display": "Blood pressure panel"}]},
        "subject": {"reference": f"Patient/{number % 1000}"},
        "encounter": {"reference": f"Encounter/{number % 20000}"},
        "effectiveDateTime": moment.isoformat(),
        "issued": moment.isoformat(),
        "component": [
            {
                "code": {"coding": [{"system": "http://loinc.org", "code": code, "display": display}]},
                "valueQuantity": {"value": value, **quantity},
            }
            for code, display, value in (
                ("8480-6", "Systolic blood pressure", 110 + number % 40),
                ("8462-4", "Diastolic blood pressure", 70 + number % 20),
            )
        ],
    }
    return Record("Observation", str(resource["id"]), "1", moment, moment, msgspec.json.encode(resource))


def main(total: int) -> None:
    """Print the table."""
    views = [v for v in load_views([schema_state.sql_folder() / "views"]).views if v.resource_type == "Observation"]
    compiled = CompiledViews(views)
    parse = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode
    records = [observation(number) for number in range(total)]
    items: list[tuple[Record, ViewRows]] = [(record, compiled.rows(parse(record.body))) for record in records]
    gc.freeze()
    rows = sum(len(view_rows) for _, resource_rows in items for view_rows in resource_rows)
    size = sum(len(record.body) for record in records)
    print(f"{total:,} Observations of {size // total} bytes, {rows:,} rows in {len(views)} views")
    _measure("encoding rows, one core", rows, "rows", lambda: _encode(views, items))
    home = Path(tempfile.mkdtemp(prefix="fhir_assets_benchmark_"))
    home.chmod(0o711)
    try:
        url = embedded.ensure(home)
        migrations.upgrade(url)
        for title in ("first load", "second load of the same"):
            _measure(title, total, "resources", lambda: _load(url, views, items))
    finally:
        embedded.stop(home)
        shutil.rmtree(home)


def _encode(views: list[View], items: list[tuple[Record, ViewRows]]) -> None:
    encoders = [build_row_encoder(view, NO_ENCRYPTION, "default") for view in views]
    for record, rows in items:
        for encoder, view_rows in zip(encoders, rows, strict=True):
            for row in view_rows:
                encoder(row, record.id)


def _load(url: str, views: list[View], items: list[tuple[Record, ViewRows]]) -> None:
    with connect(url, cipher=NO_ENCRYPTION) as conn:
        ensure_tables(conn, views)
        conn.commit()
        with Loader(conn, "Observation", views, run_id="benchmark") as loader:
            for first in range(0, len(items), BATCH):
                loader.add(items[first : first + BATCH], "2024-01-01")
            loader.finish()


def _measure(title: str, count: int, unit: str, work: Callable[[], None]) -> None:
    started = perf_counter()
    work()
    seconds = perf_counter() - started
    print(f"{title:<28}{seconds:>8.2f} s {count / seconds:>12,.0f} {unit}/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
