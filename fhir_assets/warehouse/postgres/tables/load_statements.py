"""What a load says to Postgres."""

from collections.abc import Sequence

from psycopg import sql

from fhir_assets.catalog import BY_NAME
from fhir_assets.fhir.views import View
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import consents, withheld_resources
from fhir_assets.warehouse.postgres.tables.layout import KEY_COLUMN, build_layout


class LoadStatements:
    """The statements of one resource type, which talk to its own partition of ``fhir.resource``.

    ``known`` counts which ids of a JSON array are there, and tells the time; ``copy_new`` puts resources in their place
    of which none is. The others go by way of a temporary table: ``stage``, ``copy_stage``, ``upsert``, ``clear_stage``.
    """

    def __init__(
        self,
        resource_type: str,
        views: Sequence[View],
        *,
        encrypted: bool,
        consent_gate: ConsentGate,
        reencrypt: bool = False,
    ) -> None:
        known = BY_NAME.get(resource_type)
        table = sql.Identifier("fhir", f"resource_{known.key}" if known else "resource_other")
        stage = sql.Identifier("pg_temp", f"stage_{known.key if known else 'other'}")
        self.stage = sql.SQL(
            "CREATE TEMPORARY TABLE IF NOT EXISTS {} (id text, version_id text, version_number bigint,"
            " last_updated timestamptz, as_of timestamptz, partition_key text, patients text[],"
            " resource jsonb) ON COMMIT DROP"
        ).format(stage)
        self.copy_stage = sql.SQL("COPY {} FROM STDIN").format(stage)
        self.clear_stage = sql.SQL("TRUNCATE {}").format(stage)
        # Counted, not asked whether any exists: Postgres would hope to come across one, and read the whole table.
        self.known = sql.SQL(
            "SELECT count(*), clock_timestamp() FROM {} WHERE resource_type = {}"
            " AND id = ANY(ARRAY(SELECT jsonb_array_elements_text(%s)))"
        ).format(table, sql.Literal(resource_type))
        self.copy_new = sql.SQL(
            "COPY {} (resource_type, run_id, loaded_at, key_id, id, version_id, version_number, last_updated, as_of,"
            " partition_key, patients, resource) FROM STDIN"
        ).format(table)
        self.upsert = sql.SQL(
            "INSERT INTO {table} AS stored (resource_type, id, version_id, version_number, last_updated, as_of,"
            " partition_key, run_id, loaded_at, key_id, patients, resource)"
            " SELECT {type}, id, version_id, version_number, last_updated, as_of, partition_key, %(run)s,"
            " clock_timestamp(), %(key_id)s, patients, resource FROM {stage}"
            # So that two loads do not wait for each other crosswise.
            ' ORDER BY id COLLATE "C"'
            " ON CONFLICT (resource_type, id) DO UPDATE SET version_id = excluded.version_id,"
            " version_number = excluded.version_number, last_updated = excluded.last_updated,"
            " as_of = excluded.as_of, partition_key = excluded.partition_key, run_id = excluded.run_id,"
            " loaded_at = excluded.loaded_at, key_id = excluded.key_id, patients = excluded.patients,"
            " deleted_at = NULL, resource = excluded.resource"
            " WHERE (excluded.as_of, coalesce(excluded.version_number, 0))"
            " >= (stored.as_of, coalesce(stored.version_number, 0))"
            " AND (stored.deleted_at IS NULL OR excluded.as_of > stored.as_of"
            " OR excluded.version_number > stored.version_number)"
            " RETURNING id, xmax = 0"
        ).format(table=table, type=sql.Literal(resource_type), stage=stage)
        if reencrypt:
            self.upsert = sql.SQL(
                "UPDATE {table} stored SET resource = s.resource, key_id = %(key_id)s FROM {stage} s"
                " WHERE stored.resource_type = {type} AND stored.id = s.id AND stored.resource IS NOT NULL"
                " RETURNING stored.id, false"
            ).format(table=table, type=sql.Literal(resource_type), stage=stage)
        self.consents: tuple[sql.Composed, ...] = ()
        if resource_type == "Consent" and not reencrypt:
            self.consents = consents.build_record_statements(stage, sql.Placeholder("key_id"))
        self.consent_gate = (
            withheld_resources.build_gate_statements(consent_gate, resource_type, table, stage)
            if consent_gate.closed
            else None
        )
        self.may_insert = not (self.consents or self.consent_gate or reencrypt)
        self.views = [_of_view(view, encrypted=encrypted) for view in views]


def _of_view(view: View, *, encrypted: bool) -> tuple[sql.Composed, sql.Composed]:
    table = sql.Identifier("fhir", view.name)
    columns = sql.SQL(", ").join(
        [sql.Identifier(column.name) for column in build_layout(view, encrypted=encrypted).columns]
    )
    return (
        sql.SQL("DELETE FROM {} WHERE {} = ANY(%s)").format(table, sql.Identifier(KEY_COLUMN)),
        sql.SQL("COPY {} ({}) FROM STDIN").format(table, columns),
    )
