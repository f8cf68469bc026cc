"""What the asset catalog of the Dagster UI shows of an asset: layer, domain, owners, and whether it has patient
data.
"""

from collections.abc import Sequence
from typing import TypedDict

import dagster as dg

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


def build_documentation(resource_type: ResourceType) -> dict[str, dg.MetadataValue]:
    """Return the metadata entry that links to the specification of a resource type."""
    return {"documentation": dg.MetadataValue.url(f"https://hl7.org/fhir/R4/{resource_type.name.lower()}.html")}


def build_place(store_url: str, layer: str, resource_type: ResourceType) -> dict[str, str]:
    """Return the metadata entry that names the folder of a layer's files in the store."""
    return {"dagster/uri": f"{store_url.rstrip('/')}/{layer}/{resource_type.key}"}
