"""``ops.withheld``: resources that consent keeps out of schema ``fhir`` until a decision permits them.

The decisions are in ``consents``. A load runs the statements of ``build_consent_gate_statements`` on each chunk. When a
decision changes, ``withhold_resources``, ``find_releasable`` and ``remove_released`` move the resources.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg import sql

from fhir_assets.privacy.consent import ConsentGate, Policy
from fhir_assets.warehouse.postgres import version_order
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import decrypt_text

_COLUMNS = sql.SQL("id, version_id, version_number, last_updated, as_of, arrived, partition_key")


def build_withheld_condition(consent_gate: ConsentGate, table: str) -> sql.Composed:
    """Return the SQL condition for withheld rows of ``table``, which must have a column ``patients``.

    A resource of several patients is withheld if the decision on any of them withholds it. A resource without patients
    is never withheld.
    """
    if consent_gate.policy is Policy.OFF:
        return sql.SQL("false").format()
    if consent_gate.policy is Policy.OPT_OUT:
        condition = sql.SQL("""
            EXISTS (
                SELECT FROM ops.consents c
                WHERE c.source = ops.current_source()
                    AND c.patient_id = ANY({patients}) AND c.purpose = {purpose} AND c.decision = 'deny'
            )
        """)
    else:
        condition = sql.SQL("""
            EXISTS (
                SELECT FROM unnest({patients}) p
                WHERE NOT EXISTS (
                    SELECT FROM ops.consents c
                    WHERE c.source = ops.current_source()
                        AND c.patient_id = p
                        AND c.purpose = {purpose}
                        AND c.decision = 'permit'
                )
            )
        """)
    return condition.format(patients=sql.Identifier(table, "patients"), purpose=sql.Literal(consent_gate.purpose.value))


@dataclass(frozen=True, slots=True)
class ConsentGateStatements:
    """The statements that a load runs on a staged chunk before it writes the chunk to the table."""

    withhold: sql.Composed
    """Move withheld resources from the stage to ``ops.withheld`` and return their ids. Parameters: run, key_id."""
    remove_superseded: sql.Composed
    """Delete from the stage the resources that ``ops.withheld`` has in a newer version."""
    remove_released: sql.Composed
    """Delete from ``ops.withheld`` the resources that are in the stage."""
    remove_loaded: sql.Composed
    """Delete older versions of withheld resources from the table and return their ids. Parameter: ids."""
    remove_outdated: sql.Composed
    """Delete from ``ops.withheld`` the resources that the table has in a newer version. Parameter: ids."""


def build_consent_gate_statements(
    consent_gate: ConsentGate, resource_type: str, table: sql.Identifier, stage: sql.Identifier
) -> ConsentGateStatements:
    """Return the statements for a resource type.

    ``stage`` is a table with the columns of ``fhir.resource`` that describe a version.
    """
    names: dict[str, sql.Composable] = {
        "table": table,
        "stage": stage,
        "type": sql.Literal(resource_type),
        "columns": _COLUMNS,
        "withheld": build_withheld_condition(consent_gate, "s"),
        "supersedes_known": version_order.supersedes("excluded", "known"),
        "replaced_last_updated": version_order.replaced_last_updated("excluded", "known"),
        "staged_supersedes_withheld": version_order.supersedes("s", "w"),
        "withheld_supersedes_loaded": version_order.supersedes_stored("w", "r"),
    }
    return ConsentGateStatements(
        withhold=_WITHHOLD.format(**names),
        remove_superseded=_REMOVE_SUPERSEDED.format(**names),
        remove_released=_REMOVE_RELEASED.format(**names),
        remove_loaded=_REMOVE_LOADED.format(**names),
        remove_outdated=_REMOVE_OUTDATED.format(**names),
    )


_WITHHOLD = sql.SQL("""
    WITH moved AS (
        DELETE FROM {stage} s WHERE {withheld} RETURNING s.*
    ), inserted AS (
        INSERT INTO ops.withheld AS known (resource_type, {columns}, run_id, key_id, patients, resource)
        SELECT {type}, {columns}, %(run)s, %(key_id)s, patients, resource FROM moved
        ON CONFLICT (resource_type, id, source) DO UPDATE SET
            version_id = excluded.version_id,
            version_number = excluded.version_number,
            last_updated = excluded.last_updated,
            as_of = excluded.as_of,
            arrived = excluded.arrived,
            replaced_last_updated = {replaced_last_updated},
            partition_key = excluded.partition_key,
            run_id = excluded.run_id,
            key_id = excluded.key_id,
            patients = excluded.patients,
            resource = excluded.resource
        WHERE {supersedes_known}
    )
    SELECT id FROM moved
""")
_REMOVE_SUPERSEDED = sql.SQL("""
    DELETE FROM {stage} s USING ops.withheld w
    WHERE w.source = ops.current_source()
        AND w.resource_type = {type}
        AND w.id = s.id
        AND NOT ({staged_supersedes_withheld})
""")
_REMOVE_RELEASED = sql.SQL("""
    DELETE FROM ops.withheld w USING {stage} s
    WHERE w.source = ops.current_source() AND w.resource_type = {type} AND w.id = s.id
""")
_REMOVE_LOADED = sql.SQL("""
    DELETE FROM {table} r USING ops.withheld w
    WHERE r.source = ops.current_source() AND r.resource_type = {type} AND r.id = ANY(%(ids)s)
        AND w.source = r.source AND w.resource_type = {type} AND w.id = r.id
        AND ({withheld_supersedes_loaded})
    RETURNING r.id
""")
_REMOVE_OUTDATED = sql.SQL("""
    DELETE FROM ops.withheld w USING {table} r
    WHERE w.source = ops.current_source() AND w.resource_type = {type} AND w.id = ANY(%(ids)s)
        AND r.source = w.source AND r.resource_type = {type} AND r.id = w.id
        AND NOT ({withheld_supersedes_loaded})
""")


def count_by_partition(conn: Connection, resource_type: str, partition_keys: Sequence[str]) -> dict[str, int]:
    """Return the number of withheld resources of a type by partition key."""
    rows = conn.execute(
        """
        SELECT partition_key, count(*)
        FROM ops.withheld
        WHERE source = ops.current_source()
            AND resource_type = %s AND partition_key = ANY(%s)
        GROUP BY 1
        """,
        [resource_type, list(partition_keys)],
    )
    return dict(rows.fetchall())


def remove_deleted(conn: Connection, resource_type: str, ids: Sequence[str]) -> None:
    """Delete the withheld versions of resources that are older than their tombstones in ``fhir.resource``."""
    conn.execute(
        """
        DELETE FROM ops.withheld w USING fhir.resource r
        WHERE w.source = ops.current_source() AND w.resource_type = %(type)s AND w.id = ANY(%(ids)s)
            AND r.source = w.source AND r.resource_type = %(type)s AND r.id = w.id
            AND r.deleted_at IS NOT NULL AND r.as_of >= w.as_of
        """,
        {"type": resource_type, "ids": list(ids)},
    )


def withhold_resources(
    conn: Connection, consent_gate: ConsentGate, *, patients: Sequence[str] | None = None, limit: int | None = None
) -> dict[str, int]:
    """Move loaded resources that are now withheld to ``ops.withheld``, and delete their rows from every view's table.

    Returns the number of moved resources by type, ``limit`` in total at most. With ``patients``, only the resources of
    these patients are moved.
    """
    affected: sql.Composable = sql.SQL("cardinality(r.patients) > 0")
    if patients is not None:
        affected = sql.SQL("""
            (r.patients[1] = ANY(%(patients)s) OR (cardinality(r.patients) > 1 AND r.patients && %(patients)s))
        """)
    query = sql.SQL("""
        WITH moved AS (
            DELETE FROM fhir.resource
            WHERE (resource_type, id, source) IN (
                SELECT r.resource_type, r.id, r.source
                FROM fhir.resource r
                WHERE r.source = ops.current_source() AND {affected} AND {withheld} AND r.resource IS NOT NULL
                LIMIT %(limit)s
            )
            RETURNING *
        ), inserted AS (
            INSERT INTO ops.withheld (
                resource_type, {columns}, replaced_last_updated, run_id, key_id, patients, resource
            )
            SELECT resource_type, {columns}, replaced_last_updated, run_id, key_id, patients, resource FROM moved
            ON CONFLICT (resource_type, id, source) DO NOTHING
        )
        SELECT resource_type, array_agg(id) FROM moved GROUP BY 1
    """).format(affected=affected, withheld=build_withheld_condition(consent_gate, "r"), columns=_COLUMNS)
    moved = conn.execute(query, {"patients": list(patients or ()), "limit": limit}).fetchall()
    for resource_type, ids in moved:
        delete_view_rows(conn, resource_type, ids)
    return {resource_type: len(ids) for resource_type, ids in moved}


def delete_view_rows(conn: Connection, resource_type: str, ids: Iterable[str]) -> None:
    """Delete the rows of resources from the tables of all views of the type, including views that were removed."""
    names = conn.execute(
        """
        SELECT name
        FROM ops.view_tables v
        WHERE resource_type = %s
            AND EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = 'fhir'::regnamespace AND c.relname = v.name)
        """,
        [resource_type],
    ).fetchall()
    for (name,) in names:
        conn.execute(
            sql.SQL("DELETE FROM {} WHERE _source = ops.current_source() AND _resource_key = ANY(%s)").format(
                sql.Identifier("fhir", name)
            ),
            [list(ids)],
        )


@dataclass(frozen=True, slots=True)
class WithheldResource:
    """A withheld resource with its decrypted JSON."""

    resource_type: str
    partition_key: str
    id: str
    arrived: datetime
    dated: bool
    """Whether its ``meta.lastUpdated``, if it has one, counts."""
    body: bytes


def find_releasable(
    conn: Session, consent_gate: ConsentGate, *, patients: Sequence[str] | None, limit: int
) -> list[WithheldResource]:
    """Return at most ``limit`` resources in ``ops.withheld`` that are now permitted, by type and partition.

    With ``patients``, only the resources of these patients are returned. Raises EncryptionError if a resource cannot
    be decrypted.
    """
    query = sql.SQL("""
        SELECT
            w.resource_type, w.partition_key, w.id, coalesce(w.arrived, w.as_of), w.last_updated IS NOT NULL,
            CASE WHEN w.key_id IS NULL THEN w.resource::text ELSE w.resource #>> '{{}}' END,
            w.key_id
        FROM ops.withheld w
        WHERE w.source = ops.current_source() AND {affected} AND NOT ({withheld})
        ORDER BY w.resource_type, w.partition_key, w.last_updated IS NOT NULL, w.id
        LIMIT %(limit)s
    """).format(
        affected=sql.SQL("true" if patients is None else "w.patients && %(patients)s"),
        withheld=build_withheld_condition(consent_gate, "w"),
    )
    cipher = cipher_of(conn)
    rows = conn.execute(query, {"patients": list(patients or ()), "limit": limit}).fetchall()
    return [
        WithheldResource(resource_type, partition_key, resource_id, arrived, dated, decrypt_text(text, key_id, cipher))
        for resource_type, partition_key, resource_id, arrived, dated, text, key_id in rows
    ]


def remove_released(conn: Connection, resource_type: str, ids: Sequence[str]) -> None:
    """Delete loaded resources from ``ops.withheld``. Call it in the transaction of the load."""
    conn.execute(
        "DELETE FROM ops.withheld WHERE source = ops.current_source() AND resource_type = %s AND id = ANY(%s)",
        [resource_type, list(ids)],
    )
