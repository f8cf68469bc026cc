"""The ViewDefinitions of a deployment: the shipped ones and those of FHIR_VIEWS."""

from pathlib import Path

from fhir_assets.fhir.references import normalize_bases
from fhir_assets.fhir.views import ViewSet, load_views
from fhir_assets.settings import Settings
from fhir_assets.warehouse.postgres.db.migrations import sql_folder


def build_views(settings: Settings) -> ViewSet:
    """Load the ViewDefinitions of ``sql/views`` and of FHIR_VIEWS, in this order.

    Absolute references make keys if they begin with FHIR_BASE_URL or FHIR_LINK_BASE, whatever the channel of their
    resource; no reference to another server does.
    """
    folders = [sql_folder() / "views", *([settings.fhir_views] if settings.fhir_views else [])]
    return load_views(
        [Path(folder) for folder in folders], normalize_bases([settings.fhir_base_url, settings.fhir_link_base])
    )
