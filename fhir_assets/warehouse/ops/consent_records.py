"""``ops.consent_records``: the newest version of every Consent resource.

A change of a Consent marks its patients in ``ops.consent_changes``, so that the module ``consents`` updates their
decisions.
"""

from collections.abc import Sequence

from psycopg import sql

from fhir_assets.warehouse.ops.withheld_conditions import build_delivery_key, build_unresolved_condition
from fhir_assets.warehouse.postgres import version_order
from fhir_assets.warehouse.postgres.db.connections import Connection


def build_record_statements(
    source: sql.Composable, key_id: sql.Composable, *, by_file: bool
) -> tuple[sql.Composed, ...]:
    """Return statements that copy the Consents in the relation ``source`` to ``ops.consent_records`` and mark their
    patients for a decision.

    The first statement returns the keys of the patients that it marks. ``source`` has the columns of
    ``fhir.resource``; ``key_id`` is the expression for the key that encrypts them, in which ``s`` names a row of
    ``source``. With ``by_file``, resources with an equal time of arrival belong to one file.
    """
    keys = _KEYS.format(
        delivery=build_delivery_key("s"),
        is_unresolved=build_unresolved_condition("s"),
        by_file=sql.Literal(by_file),
    )
    return (
        _MARK_PATIENTS.format(source=source, keys=keys),
        _COPY_CONSENTS.format(
            source=source,
            keys=keys,
            key_id=key_id,
            supersedes_known=version_order.supersedes("excluded", "known"),
            replaced_last_updated=version_order.replaced_last_updated("excluded", "known"),
        ),
    )


_KEYS = sql.SQL("""
    ARRAY(SELECT p FROM unnest(s.patients) p WHERE left(p, 1) NOT IN ('?', '#'))
    || ARRAY(SELECT substr(m, 2) FROM unnest(s.mentions) m WHERE starts_with(m, '!'))
    || CASE
        WHEN cardinality(s.patients) > 0
            AND NOT {is_unresolved}
            THEN '{{}}'
        WHEN {by_file} OR EXISTS (
            SELECT FROM ops.received r
            WHERE r.source = ops.current_source()
                AND r.resource_type = 'Consent'
                AND r.partition_key = s.partition_key
                AND s.arrived = ANY(r.arrivals)
        )
            THEN ARRAY[{delivery}]
        ELSE ARRAY['?' || s.id]
    END
""")
_MARK_PATIENTS = sql.SQL("""
    WITH named AS (
        SELECT unnest({keys}) AS key FROM {source} s
    )
    INSERT INTO ops.consent_changes (patient_id, at)
    SELECT key, '-infinity'::timestamptz FROM named
    UNION
    SELECT unnest(known.keys), '-infinity'
    FROM {source} s
    JOIN ops.consent_records known ON known.consent_id = s.id AND known.source = ops.current_source()
    UNION
    SELECT r.id, '-infinity'
    FROM fhir_partitions.resource_patient r
    WHERE r.source = ops.current_source()
        AND r.deleted_at IS NULL
        AND r.mentions && ARRAY(SELECT key FROM named WHERE starts_with(key, '#'))
    UNION
    SELECT w.id, '-infinity'
    FROM ops.withheld w
    WHERE w.source = ops.current_source()
        AND w.resource_type = 'Patient'
        AND w.mentions && ARRAY(SELECT key FROM named WHERE starts_with(key, '#'))
    ON CONFLICT (patient_id, source) DO UPDATE SET at = excluded.at
    RETURNING patient_id
""")
_COPY_CONSENTS = sql.SQL("""
    INSERT INTO ops.consent_records AS known
        (consent_id, keys, version_id, version_number, last_updated, as_of, arrived, resource, key_id)
    SELECT
        s.id, {keys}, s.version_id, s.version_number, s.last_updated, s.as_of, s.arrived, s.resource, {key_id}
    FROM {source} s
    WHERE s.resource IS NOT NULL
        AND NOT EXISTS (
            SELECT FROM fhir_partitions.resource_consent r
            WHERE r.source = ops.current_source()
                AND r.id = s.id
                AND r.deleted_at IS NOT NULL
                AND r.as_of >= s.as_of
        )
    ON CONFLICT (consent_id, source) DO UPDATE SET
        keys = excluded.keys,
        version_id = excluded.version_id,
        version_number = excluded.version_number,
        last_updated = excluded.last_updated,
        as_of = excluded.as_of,
        arrived = excluded.arrived,
        replaced_last_updated = {replaced_last_updated},
        resource = excluded.resource,
        key_id = excluded.key_id
    WHERE {supersedes_known}
""")
_RECORDED_CONSENTS = sql.SQL("""
    (
        SELECT
            id, version_id, version_number, last_updated, as_of, arrived, partition_key, patients, mentions, resource,
            key_id
        FROM fhir_partitions.resource_consent
        WHERE source = ops.current_source()
        UNION ALL
        SELECT
            id, version_id, version_number, last_updated, as_of, arrived, partition_key, patients, mentions, resource,
            key_id
        FROM ops.withheld
        WHERE source = ops.current_source() AND resource_type = 'Consent'
    )
""")


def record_loaded_consents(conn: Connection, *, by_file: bool) -> None:
    """Copy all Consents, loaded and withheld, to ``ops.consent_records`` and mark their patients for a decision."""
    for statement in build_record_statements(_RECORDED_CONSENTS, sql.Identifier("s", "key_id"), by_file=by_file):
        conn.execute(statement)


def record_resolved_consents(conn: Connection, consent_ids: Sequence[str]) -> None:
    """Record the patients of withheld Consents whose patients were not known before, and mark all for a decision."""
    conn.execute(
        """
        INSERT INTO ops.consent_changes (patient_id, at)
        SELECT DISTINCT key, '-infinity'::timestamptz
        FROM ops.consent_records r
        JOIN ops.withheld w ON w.source = r.source AND w.resource_type = 'Consent' AND w.id = r.consent_id
        CROSS JOIN unnest(r.keys || w.patients) key
        WHERE r.source = ops.current_source() AND r.consent_id = ANY(%s)
        ON CONFLICT (patient_id, source) DO UPDATE SET at = excluded.at
        """,
        [list(consent_ids)],
    )
    conn.execute(
        """
        UPDATE ops.consent_records r
        SET keys = ARRAY(SELECT DISTINCT key FROM unnest(r.keys || w.patients) key WHERE left(key, 1) NOT IN ('@', '?'))
        FROM ops.withheld w
        WHERE r.source = ops.current_source()
            AND r.consent_id = ANY(%s)
            AND w.source = r.source
            AND w.resource_type = 'Consent'
            AND w.id = r.consent_id
        """,
        [list(consent_ids)],
    )


def remove_deleted(conn: Connection, consent_ids: Sequence[str]) -> None:
    """Delete the records of Consents that have newer tombstones, and mark their patients for a decision."""
    conn.execute(
        """
        WITH deleted AS (
            DELETE FROM ops.consent_records c USING fhir_partitions.resource_consent r
            WHERE c.source = ops.current_source()
                AND c.consent_id = ANY(%s)
                AND r.source = c.source
                AND r.id = c.consent_id
                AND r.deleted_at IS NOT NULL
                AND r.as_of >= c.as_of
            RETURNING c.keys
        )
        INSERT INTO ops.consent_changes (patient_id, at)
        SELECT DISTINCT unnest(keys), '-infinity'::timestamptz FROM deleted
        ON CONFLICT (patient_id, source) DO UPDATE SET at = excluded.at
        """,
        [list(consent_ids)],
    )
