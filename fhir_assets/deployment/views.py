"""The ViewDefinitions of a deployment: the shipped ones and those of FHIR_VIEWS."""

from functools import lru_cache, partial
from pathlib import Path

from fhir_assets.errors import ConfigurationError
from fhir_assets.fhir.references import Bases, normalize_bases
from fhir_assets.fhir.views import FileVersion, View, ViewSet, check_nesting, list_versions, load_views
from fhir_assets.settings import Settings
from fhir_assets.warehouse.postgres.db.schema_state import sql_folder
from fhir_assets.warehouse.postgres.tables.layout import build_layout


def build_views(settings: Settings) -> ViewSet:
    """Load the ViewDefinitions of ``sql/views`` and of FHIR_VIEWS, in this order.

    A view that cannot have a table in Postgres, because of its names or tags, or whose paths are nested
    too deeply is reported as broken. Raises ConfigurationError if the folder of FHIR_VIEWS does not exist. Absolute
    references get keys if they begin with FHIR_BASE_URL or FHIR_LINK_BASE, through any ingestion channel; references to
    other servers get none.
    """
    folders = tuple(find_view_folders(settings))
    return _build_views(folders, find_reference_bases(settings), settings.encrypts, list_versions(folders))


@lru_cache(maxsize=4)
def _build_views(
    folders: tuple[Path, ...], bases: Bases, encrypted: bool, versions: tuple[FileVersion, ...]
) -> ViewSet:
    """Load the views of the folders, whose files have these ``versions``: runs and commands do so several times."""
    return load_views(folders, bases, trusted=folders[:1], validate=partial(validate_view, encrypted=encrypted))


def validate_view(view: View, *, encrypted: bool) -> None:
    """Raise ViewError if a view can have no table in Postgres, or no rows because its paths are nested too deeply."""
    build_layout(view, encrypted=encrypted)
    check_nesting(view)


def find_view_folders(settings: Settings) -> list[Path]:
    """Return the folder of the shipped views, and FHIR_VIEWS. Raises ConfigurationError if that does not exist."""
    if settings.fhir_views and not settings.fhir_views.is_dir():
        raise ConfigurationError(
            f"FHIR_VIEWS: there is no folder {settings.fhir_views}: create it, or correct the setting"
        )
    return [sql_folder() / "views", *([Path(settings.fhir_views)] if settings.fhir_views else [])]


def find_reference_bases(settings: Settings) -> Bases:
    """Return the base URLs of the sources. Absolute references have a key if they begin with one of them."""
    return normalize_bases([settings.fhir_base_url, settings.fhir_link_base])
