"""`fhir-assets migrate`: create or upgrade the schema of the database."""

from time import monotonic
from typing import Annotated

import typer

from fhir_assets.cli.output import console
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.instance import config
from fhir_assets.pipeline.rebuild.step import RebuildProgress, RebuildStep
from fhir_assets.settings import load_settings
from fhir_assets.warehouse.postgres.db import roles
from fhir_assets.warehouse.postgres.db.connections import repeat_after_deadlock
from fhir_assets.warehouse.postgres.tables import foreign_keys, view_tables


def migrate(
    apply_view_changes: Annotated[
        bool,
        typer.Option(help="Also change and drop columns as the ViewDefinitions require; this deletes their data"),
    ] = False,
    cascade: Annotated[
        bool,
        typer.Option(help="With --apply-view-changes: also drop the SQL views that depend on a dropped column"),
    ] = False,
) -> None:
    """Create or upgrade the schemas, the tables of all ViewDefinitions, and Dagster's database."""
    settings = load_settings()
    config.ensure_dagster_database(settings)
    views = build_views(settings)
    warehouse = Warehouse(settings)
    warehouse.migrate()
    step = RebuildStep(warehouse.connect, views.views, on_progress=_ProgressPrinter())
    rebuilt = step.run(drop_columns=apply_view_changes, cascade=cascade)

    def finish() -> tuple[dict[str, str], list[str]]:
        with warehouse.connect() as conn:
            refused = view_tables.refresh_marts(conn, retry_refused=True)
            foreign_keys.apply(conn, views.views, wanted=settings.fhir_foreign_keys)
            roles.grant_rights(conn)
            return refused, roles.list_missing_roles(conn)

    refused, missing_roles = repeat_after_deadlock(finish, "the upgrade of marts, foreign keys and rights")
    console.print(f"The database is up to date: {len(views.views)} tables in schema fhir.")
    for resource_type, count in rebuilt.refused.items():
        console.print(
            f"{resource_type}: the changed views yield no rows for {count:,} resources. Their rows are unchanged. "
            "Load their windows again: each becomes a dead letter that names the column.",
            soft_wrap=True,
        )
    for mart, reason in refused.items():
        console.print(f"marts.{mart} could not be created: {reason}", markup=False, soft_wrap=True)
    if missing_roles:
        statements = "; ".join(f"CREATE ROLE {name} NOLOGIN" for name in missing_roles)
        console.print(
            f"The user of DB_URL may not create the roles {', '.join(missing_roles)}, so only that user can read the "
            f"tables. Ask an administrator to run `{statements}`, then run `fhir-assets migrate` again.",
            markup=False,
            soft_wrap=True,
        )
    for broken in views.broken:
        console.print(
            f"Skipped, because the ViewDefinition is not valid: {broken.path}: {broken.message}", markup=False
        )


class _ProgressPrinter:
    """Prints the progress of a rebuild: a line every few seconds, and one when a resource type is finished."""

    _SECONDS = 5.0

    def __init__(self) -> None:
        self._printed = monotonic()

    def __call__(self, progress: RebuildProgress) -> None:
        if progress.done < progress.total and monotonic() - self._printed < self._SECONDS:
            return
        self._printed = monotonic()
        console.print(
            f"{progress.resource_type}: rows of {progress.done:,} of {progress.total:,} resources are up to date"
        )
