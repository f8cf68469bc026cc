"""The models of the dbt package without dbt: their SQL, rendered for tables that a test fills."""

import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import jinja2

from fhir_assets.fhir.views import View
from fhir_assets.warehouse.postgres.tables.layout import SOURCE_COLUMN, build_layout

_REFERENCE = re.compile(r"ref\('(\w+)'\)")
_DUCKDB_TYPES = {"numeric": "decimal(38, 18)", "jsonb": "text"}


def build_staging_tables(files: Mapping[str, str], views: Mapping[str, View], engine: str, *, encrypted: bool) -> str:
    """Return the statements that create an empty table for each staging model of the package, with its name."""
    statements = []
    for path in files:
        if not path.startswith("models/staging/"):
            continue
        name = path.removeprefix("models/staging/").removesuffix(".sql")
        columns = [f"{SOURCE_COLUMN} text"]
        for column in build_layout(views[name.removeprefix("stg_")], encrypted=encrypted).readable_columns:
            kind = _DUCKDB_TYPES.get(column.type, column.type) if engine == "duckdb" else column.type
            columns.append(f'"{column.name}" {kind}')
        statements.append(f"CREATE TABLE {name} ({', '.join(columns)})")
    return ";\n".join(statements)


def render_models(files: Mapping[str, str], engine: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the SELECT of each model other than those of staging, after the models that it reads."""
    macros = "".join(text for path, text in files.items() if path.startswith("macros/"))
    models = {
        path.rpartition("/")[2].removesuffix(".sql"): text
        for path, text in files.items()
        if path.startswith("models/") and path.endswith(".sql") and not path.startswith("models/staging/")
    }
    environment = jinja2.Environment()
    environment.globals |= {
        "ref": str,
        "source": lambda _, name: str(name),
        "var": {"omop_vocabulary": ""}.__getitem__,
        "target": SimpleNamespace(type=engine),
    }
    waiting = dict(models)
    while waiting:
        ready = [name for name, text in waiting.items() if waiting.keys().isdisjoint(_REFERENCE.findall(text))]
        for name in ready:
            yield name, environment.from_string(macros + waiting.pop(name)).render()
