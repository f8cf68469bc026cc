"""`fhir-assets migrate`: the database's schema."""

from typing import Annotated

import typer

from fhir_assets.cli.output import console
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.instance import config
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import roles
from fhir_assets.warehouse.postgres.tables import view_tables


def migrate(
    apply_view_changes: Annotated[
        bool, typer.Option(help="Also apply changed types and removed columns of ViewDefinitions; drops their data")
    ] = False,
) -> None:
    """Create or upgrade the schemas, a table for every ViewDefinition, and Dagster's database."""
    settings = load_settings()
    config.ensure_dagster_database(settings)
    views = build_views(settings)
    warehouse = Warehouse(settings)
    warehouse.migrate()
    with warehouse.connect() as conn:
        if apply_view_changes:
            view_tables.apply_changes(conn, views.views)
        else:
            view_tables.ensure_tables(conn, views.views)
        roles.grant(conn)
        absent = roles.missing(conn)
    console.print(f"The database is up to date: {len(views.views)} tables in schema fhir.")
    if absent:
        console.print(
            f"The user of DB_URL may not create the roles {', '.join(absent)}: nobody but it has rights here. Have an "
            f"administrator run `{'; '.join(f'CREATE ROLE {name} NOLOGIN' for name in absent)}`, then this again.",
            markup=False,
            soft_wrap=True,
        )
    for broken in views.broken:
        console.print(f"Left out: {broken.path}: {broken.message}", markup=False)
