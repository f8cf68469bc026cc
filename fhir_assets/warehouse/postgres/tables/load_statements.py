"""The SQL statements of a load, composed once for each resource type."""

from collections.abc import Sequence
from typing import NamedTuple

from psycopg import sql

from fhir_assets.fhir.views import View
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import consent_records, withheld_resources
from fhir_assets.warehouse.postgres import version_order
from fhir_assets.warehouse.postgres.db.resource_partitions import partition_name, partition_of
from fhir_assets.warehouse.postgres.tables.layout import build_layout

_CREATE_STAGE = """
    CREATE TEMPORARY TABLE IF NOT EXISTS {stage} (
        id text,
        version_id text,
        version_number bigint,
        last_updated timestamptz,
        as_of timestamptz,
        arrived timestamptz,
        partition_key text,
        patients text[],
        keyless text[],
        mentions text[],
        identifiers text[],
        resource jsonb
    )
    ON COMMIT DROP
"""
# A count instead of EXISTS: for EXISTS the planner expects an early match and chooses a scan of the whole table.
_COUNT_STORED = """
    SELECT count(*), clock_timestamp()
    FROM {table}
    WHERE source = ops.current_source()
        AND resource_type = {type}
        AND id = ANY(ARRAY(SELECT jsonb_array_elements_text(%s)))
"""
_COPY_NEW = """
    COPY {table} (
        resource_type, run_id, loaded_at, key_id,
        id, version_id, version_number, last_updated, as_of, arrived, partition_key, patients, keyless, mentions,
        identifiers, resource
    )
    FROM STDIN
"""
# Every load locks rows in the order of ids, so that two loads of the same resources cannot deadlock.
_MERGE = """
    INSERT INTO {table} AS stored (
        resource_type, id, version_id, version_number, last_updated, as_of, arrived, partition_key,
        run_id, loaded_at, key_id, patients, keyless, mentions, identifiers, resource
    )
    SELECT
        {type}, id, version_id, version_number, last_updated, as_of, arrived, partition_key,
        %(run)s, clock_timestamp(), %(key_id)s, patients, keyless, mentions, identifiers, resource
    FROM {stage}
    ORDER BY id COLLATE "C"
    ON CONFLICT (resource_type, id, source) DO UPDATE SET
        version_id = excluded.version_id,
        version_number = excluded.version_number,
        last_updated = excluded.last_updated,
        as_of = excluded.as_of,
        arrived = excluded.arrived,
        replaced_last_updated = {replaced_last_updated},
        partition_key = excluded.partition_key,
        run_id = excluded.run_id,
        loaded_at = excluded.loaded_at,
        key_id = excluded.key_id,
        patients = excluded.patients,
        keyless = excluded.keyless,
        mentions = excluded.mentions,
        identifiers = excluded.identifiers,
        deleted_at = NULL,
        resource = excluded.resource
    WHERE {supersedes_stored}
    RETURNING id, xmax = 0
"""
_REENCRYPT = """
    UPDATE {table} stored
    SET resource = s.resource, key_id = %(key_id)s
    FROM {stage} s
    WHERE stored.source = ops.current_source()
        AND stored.resource_type = {type}
        AND stored.id = s.id
        AND stored.resource IS NOT NULL
    RETURNING stored.id, false
"""


class ViewStatements(NamedTuple):
    """The statements for the table of one view."""

    delete: sql.Composed
    """Deletes the rows of resources. Parameter: a list of ids."""
    copy: sql.Composed
    """Copies rows into the table."""


class LoadStatements:
    """The statements of a load of one resource type. They address the type's partition of ``fhir.resource`` directly.

    Resources of which no version is stored are copied with ``copy_new``. All other resources are copied into a
    temporary table, the stage (``create_stage``, ``copy_to_stage``, ``clear_stage``), and merged with ``merge``.
    """

    def __init__(
        self,
        resource_type: str,
        views: Sequence[View],
        *,
        encrypted: bool,
        consent_gate: ConsentGate,
        reencrypt: bool = False,
        record_consents: bool = True,
    ) -> None:
        table = partition_of(resource_type)
        stage = sql.Identifier("pg_temp", f"stage_{partition_name(resource_type)}")
        type_name = sql.Literal(resource_type)
        self.create_stage = sql.SQL(_CREATE_STAGE).format(stage=stage)
        self.copy_to_stage = sql.SQL("COPY {stage} FROM STDIN").format(stage=stage)
        self.clear_stage = sql.SQL("TRUNCATE {stage}").format(stage=stage)
        self.count_stored = sql.SQL(_COUNT_STORED).format(table=table, type=type_name)
        """Returns the number of ids of a JSON array that are stored, and the current time."""
        self.copy_new = sql.SQL(_COPY_NEW).format(table=table)
        merge = sql.SQL(_REENCRYPT if reencrypt else _MERGE)
        self.merge = merge.format(
            table=table,
            type=type_name,
            stage=stage,
            supersedes_stored=version_order.supersedes_stored("excluded", "stored"),
            replaced_last_updated=version_order.replaced_last_updated("excluded", "stored"),
        )
        """Returns pairs of a written id and true if no version of the resource was stored before."""
        self.record_consents: tuple[sql.Composed, ...] = ()
        if resource_type == "Consent" and record_consents and not reencrypt:
            self.record_consents = consent_records.build_record_statements(
                stage, sql.Placeholder("key_id"), by_file=consent_gate.by_file
            )
        self.consent_gate = (
            withheld_resources.build_consent_gate_statements(consent_gate, resource_type, table, stage)
            if consent_gate.withholds
            else None
        )
        self.may_copy_new = not (self.record_consents or self.consent_gate or reencrypt)
        """Whether new resources may bypass the stage."""
        self.views = [build_view_statements(view, encrypted=encrypted) for view in views]


def build_view_statements(view: View, *, encrypted: bool) -> ViewStatements:
    """Return the statements for the table of a view; ``encrypted`` is True in a deployment with keys."""
    table = sql.Identifier("fhir", view.name)
    layout = build_layout(view, encrypted=encrypted)
    names = [sql.Identifier(column.name) for column in layout.columns]
    return ViewStatements(
        sql.SQL("DELETE FROM {table} WHERE _source = ops.current_source() AND {key} = ANY(%s)").format(
            table=table, key=sql.Identifier(layout.key)
        ),
        sql.SQL("COPY {table} ({columns}) FROM STDIN").format(table=table, columns=sql.SQL(", ").join(names)),
    )
