"""``ops.withheld``: resources that consent keeps out of schema ``fhir`` until a decision permits them.

The decisions are in ``consents``. A load runs the statements of ``build_consent_gate_statements`` on each chunk. When a
decision changes, the functions of ``withheld_changes`` move the resources.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from psycopg import sql

from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import withheld_conditions
from fhir_assets.warehouse.postgres import version_order
from fhir_assets.warehouse.postgres.db.connections import Connection

COLUMNS = sql.SQL("id, version_id, version_number, last_updated, as_of, arrived, partition_key")


@dataclass(frozen=True, slots=True)
class ConsentGateStatements:
    """The statements that a load runs on a staged chunk before it writes the chunk to the table."""

    resolve: tuple[sql.Composed, ...]
    """Find the patients in the stage that are named by an identifier.

    For staged Patients, mark the resources and Consents that they concern.
    """
    withhold: tuple[sql.Composed, ...]
    """Move withheld resources from the stage to ``ops.withheld``, and return their ids.

    Resources that consent itself withholds are moved first, then those that refer to withheld ones. Parameters: run,
    key_id.
    """
    remove_superseded: sql.Composed
    """Delete from the stage the resources of which ``ops.withheld`` has a newer version."""
    remove_released: sql.Composed
    """Delete from ``ops.withheld`` the resources that are in the stage, and return their ids and mentions."""
    remove_loaded: sql.Composed
    """Delete older versions of withheld resources from the table and return their ids. Parameter: ids."""
    remove_outdated: sql.Composed
    """Delete from ``ops.withheld`` the resources of which the table has a newer version, and return their ids and
    mentions.

    Parameter: ids.
    """


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
        "columns": COLUMNS,
        "patients": withheld_conditions.build_resolved_patients("s"),
        "has_tokens": withheld_conditions.build_token_condition("s"),
        "is_resolvable": withheld_conditions.build_token_condition("w"),
        "supersedes_known": version_order.supersedes("excluded", "known"),
        "replaced_last_updated": version_order.replaced_last_updated("excluded", "known"),
        "staged_supersedes_withheld": version_order.supersedes("s", "w"),
        "withheld_supersedes_loaded": version_order.supersedes_stored("w", "r"),
    }
    conditions = (
        withheld_conditions.build_withheld_condition(consent_gate, "s"),
        withheld_conditions.build_reference_condition("s", names["type"]),
    )
    resolve = [_RESOLVE] if resource_type != "Patient" else [_MARK_RESOLVABLE, _MARK_NAMED_PATIENTS]
    return ConsentGateStatements(
        resolve=tuple(statement.format(**names) for statement in resolve),
        withhold=tuple(
            _WITHHOLD.format(**names, withheld=condition, direct=sql.Literal(number == 0))
            for number, condition in enumerate(conditions)
        ),
        remove_superseded=_REMOVE_SUPERSEDED.format(**names),
        remove_released=_REMOVE_RELEASED.format(**names),
        remove_loaded=_REMOVE_LOADED.format(**names),
        remove_outdated=_REMOVE_OUTDATED.format(**names),
    )


_RESOLVE = sql.SQL("UPDATE {stage} s SET patients = {patients} WHERE {has_tokens}")
_MARK_RESOLVABLE = sql.SQL("""
    UPDATE ops.withheld w SET due = true
    FROM {stage} s
    WHERE w.source = ops.current_source()
        AND w.mentions && s.mentions
        AND {is_resolvable}
""")
_MARK_NAMED_PATIENTS = sql.SQL("""
    INSERT INTO ops.consent_changes (patient_id, at)
    SELECT DISTINCT s.id, '-infinity'::timestamptz
    FROM {stage} s
    JOIN ops.consent_records c ON c.source = ops.current_source() AND c.keys && s.mentions
    ON CONFLICT (patient_id, source) DO UPDATE SET at = excluded.at
""")
_WITHHOLD = sql.SQL("""
    WITH moved AS (
        DELETE FROM {stage} s WHERE {withheld} RETURNING s.*
    ), inserted AS (
        INSERT INTO ops.withheld AS known
            (resource_type, {columns}, run_id, key_id, patients, mentions, direct, resource)
        SELECT {type}, {columns}, %(run)s, %(key_id)s, patients, mentions, {direct}, resource FROM moved
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
            mentions = excluded.mentions,
            direct = excluded.direct,
            due = true,
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
    RETURNING w.id, w.mentions
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
    RETURNING w.id, w.mentions
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
    deleted = conn.execute(
        """
        DELETE FROM ops.withheld w USING fhir.resource r
        WHERE w.source = ops.current_source() AND w.resource_type = %(type)s AND w.id = ANY(%(ids)s)
            AND r.source = w.source AND r.resource_type = %(type)s AND r.id = w.id
            AND r.deleted_at IS NOT NULL AND r.as_of >= w.as_of
        RETURNING w.id, w.mentions
        """,
        {"type": resource_type, "ids": list(ids)},
    ).fetchall()
    mark_referring(conn, resource_type, deleted)


def mark_referring(conn: Connection, resource_type: str, released: Iterable[tuple[str, Sequence[str] | None]]) -> None:
    """Mark the resources that are withheld because they refer to the ``released`` ones.

    Released resources are given by their ids and ``mentions``.
    """
    ids, targets = list_targets((resource_type, *resource) for resource in released)
    if targets:
        conn.execute(
            """
            UPDATE ops.withheld
            SET due = true
            WHERE source = ops.current_source() AND NOT direct AND (mentions && %s OR patients && %s)
            """,
            [targets, ids],
        )


def list_targets(resources: Iterable[tuple[str, str, Sequence[str] | None]]) -> tuple[list[str], list[str]]:
    """Return the ids of the Patients among resources, and the ``mentions`` by which others refer to the resources.

    The resources are given by type, id and ``mentions``.
    """
    patients, targets = [], []
    for resource_type, resource_id, mentions in resources:
        targets.append(f"{resource_type}/{resource_id}")
        if resource_type == "Patient":
            patients.append(resource_id)
            targets += [f"~{mention}" for mention in mentions or () if mention.startswith("#")]
    return patients, targets


def delete_view_rows(conn: Connection, resource_type: str, ids: Iterable[str]) -> None:
    """Delete the rows of resources from the tables of all views of the type, including views that were removed."""
    tables = conn.execute(
        """
        SELECT name, key_column
        FROM ops.view_tables
        WHERE resource_type = %s
            AND to_regclass(format('fhir.%%I', name)) IS NOT NULL
        ORDER BY name
        """,
        [resource_type],
    ).fetchall()
    for name, key in tables:
        conn.execute(
            sql.SQL("DELETE FROM {table} WHERE _source = ops.current_source() AND {key} = ANY(%s)").format(
                table=sql.Identifier("fhir", name), key=sql.Identifier(key)
            ),
            [list(ids)],
        )
