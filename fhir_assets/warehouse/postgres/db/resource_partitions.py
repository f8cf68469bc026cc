"""The partitions of ``fhir.resource``: one for each resource type of the catalog, and one for all other types.

They are in a schema of their own, so that tools that list the tables of schema ``fhir`` do not show them.
"""

from psycopg import sql

from fhir_assets.catalog import BY_NAME

SCHEMA = "fhir_partitions"


def partition_name(resource_type: str) -> str:
    """Return the name of the partition with the resources of a type."""
    catalog_type = BY_NAME.get(resource_type)
    return f"resource_{catalog_type.key}" if catalog_type else "resource_other"


def partition_of(resource_type: str) -> sql.Identifier:
    """Return the partition with the resources of a type, as an SQL identifier."""
    return sql.Identifier(SCHEMA, partition_name(resource_type))
