"""What the catalog of the Dagster UI shows of an asset: layer, domain and owners, and whether it has patient data."""

from collections.abc import Sequence
from typing import TypedDict

from fhir_assets.catalog import ResourceType


class AssetAttributes(TypedDict):
    """Arguments of ``dg.AssetOut`` and ``dg.asset``."""

    group_name: str
    owners: Sequence[str]
    tags: dict[str, str]
    kinds: set[str]


def build_asset_attributes(
    resource_type: ResourceType, layer: str, kind: str, *, owners: Sequence[str], phi: bool
) -> AssetAttributes:
    """Return the attributes of an asset.

    The layer is also a kind, because the lineage of the UI shows kinds and no key prefixes.
    """
    return {
        "group_name": resource_type.group,
        "owners": owners,
        "tags": {"layer": layer, "domain": resource_type.group, "phi": str(phi).lower()},
        "kinds": {layer, kind},
    }
