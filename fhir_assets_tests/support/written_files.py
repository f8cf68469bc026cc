"""Files that leave a deployment: exports and the lake."""

from collections.abc import Collection

from fhir_assets.deployment.views import build_views
from fhir_assets.privacy.encryption import NO_ENCRYPTION
from fhir_assets.storage.blobs import LocalBlobs
from fhir_assets.warehouse.exports.export import Export
from fhir_assets.warehouse.lake import writer
from fhir_assets.warehouse.postgres.db.connections import connect
from fhir_assets_tests.support.deployment import Deployment


def write_files(deployment: Deployment, folder: LocalBlobs, names: Collection[str]) -> None:
    """Export the named views and the resources of their types to ``export``, and write the lake of these views."""
    with connect(deployment.url, cipher=NO_ENCRYPTION) as conn:
        with Export(conn, deployment.store, folder, "export", actor="test", withholding=True) as export:
            for view in build_views(deployment.settings).views:
                if view.name in names:
                    export.for_type(view.resource_type, None).write_valid()
                    export.for_type(view.resource_type, None).write_table(view, "ndjson")
                    writer.update(conn, folder, view, [], run_id="run", actor="test")
            export.finish()
