"""The route that exports a resource type to files."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import orjson
from fastapi import APIRouter, Query, Response

from fhir_assets.api.context import Context, CurrentCaller
from fhir_assets.api.problems import Problem, problem_responses
from fhir_assets.api.resource_types import TypeName, find_resource_type
from fhir_assets.api.run_ids import find_run_id, run_not_found
from fhir_assets.api.run_models import Exported
from fhir_assets.deployment.consent import build_consent_gate
from fhir_assets.deployment.store import build_blobs
from fhir_assets.deployment.views import build_views
from fhir_assets.pipeline.consent.step import ConsentStep
from fhir_assets.warehouse.exports.export import Export, build_run_folder, find_run_windows
from fhir_assets.warehouse.ops import window_verdicts
from fhir_assets.warehouse.postgres.tables import view_tables

router = APIRouter(tags=["runs"])


@router.post(
    "/export/{resource_type}",
    response_model=Exported,
    responses=problem_responses(404),
    summary="Export a type to files",
)
def export_type(
    context: Context,
    caller: CurrentCaller,
    resource_type: TypeName,
    run_id: Annotated[
        str | None, Query(pattern=r"^[A-Za-z0-9\-]{1,64}$", description="Export only the windows of this run")
    ] = None,
    include_raw: Annotated[bool, Query(description="Export the resources as received")] = False,
    include_normalized: Annotated[bool, Query(description="Export the tables, as Parquet")] = True,
) -> Response:
    """Files are written to FHIR_EXPORT_URL: the valid resources, and the raw resources and tables on request. Resources
    that consent withholds are left out. Windows that do not reconcile are exported as they are; the response and the
    manifest name them. The response also names the ViewDefinitions that are not valid: their tables are left out.
    """
    name = find_resource_type(context.settings.fhir_resource_types, resource_type)
    if not context.settings.fhir_export_url:
        raise Problem(
            409, "FHIR_EXPORT_URL is not set: set it to the folder or s3://bucket/prefix that exports are written to"
        )
    view_set = build_views(context.settings)
    views = [view for view in view_set.views if view.resource_type == name]
    target = build_blobs(context.settings, context.settings.fhir_export_url)
    with context.own_connection() as conn:
        keys: list[str] | None = None
        full_run_id = ""
        folder = f"exports/{name}_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        if run_id:
            try:
                full_run_id, keys_by_type = find_run_windows(conn, find_run_id(conn, run_id))
            except KeyError:  # a run that received files and loaded nothing
                raise run_not_found([]) from None
            keys, folder = keys_by_type.get(name, []), build_run_folder(full_run_id, datetime.now(UTC))
        consent_gate = build_consent_gate(context.settings)
        step = ConsentStep(
            context.warehouse.connect, view_set.views, consent_gate, run_id=caller.request_id, actor=caller.actor
        )
        step.run(datetime.now(UTC))
        view_tables.ensure_tables(conn, views)
        conn.commit()
        withholding = consent_gate.withholds
        if include_raw and withholding:
            raise Problem(
                409,
                "CONSENT_POLICY is on, and raw also contains resources that consent withholds: leave include_raw out",
            )
        with Export(
            conn,
            context.store,
            target,
            folder,
            run_id=full_run_id,
            actor=caller.actor,
            withholding=withholding,
            manifest=f"{name}.manifest.json",
        ) as export:
            type_export = export.for_type(name, keys)
            files = [type_export.write_valid()]
            if include_raw:
                files.append(type_export.write_raw())
            if include_normalized:
                files += [type_export.write_table(view, "parquet") for view in views]
            unreconciled = window_verdicts.find_faults(conn, name, keys)
            written_folder = export.finish(unreconciled={name: unreconciled})
    broken = view_set.broken if include_normalized else ()
    content = {
        "folder": written_folder,
        "files": [asdict(file) for file in files],
        "unreconciled": unreconciled,
        "broken_views": [{"file": view.path.name, "error": view.message} for view in broken],
    }
    return Response(orjson.dumps(content, default=str), media_type="application/json")
