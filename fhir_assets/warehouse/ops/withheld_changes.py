"""Changes in what consent withholds: moves resources between schema ``fhir`` and ``ops.withheld``.

Each resource that was just withheld, or that may be released, is marked as ``due`` in ``ops.withheld``. An application
of consent processes the marked resources in batches: it finds the patients who have become known, withholds the
resources that refer to the marked ones, and releases the resources that need not be withheld any more. A mark is
committed together with the change that set it, so that the next application continues one that was stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg import sql

from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops.withheld_conditions import (
    build_delivery_key,
    build_resolved_patients,
    build_token_condition,
    build_unresolved_condition,
    build_withheld_condition,
)
from fhir_assets.warehouse.ops.withheld_resources import COLUMNS, delete_view_rows, list_targets, mark_referring
from fhir_assets.warehouse.postgres.db.connections import Connection, Session
from fhir_assets.warehouse.postgres.resources import decrypt_resource

ResourceKey = tuple[str, str]
"""The type and the id of a resource."""

_IN_BATCH = sql.SQL("""
    w.source = ops.current_source()
    AND (w.resource_type, w.id) IN (SELECT * FROM unnest(%(types)s::text[], %(ids)s::text[]))
""")


def _batch_params(keys: Sequence[ResourceKey]) -> dict[str, list[str]]:
    return {"types": [resource_type for resource_type, _ in keys], "ids": [resource_id for _, resource_id in keys]}


def find_due(conn: Connection, limit: int) -> list[ResourceKey]:
    """Return at most ``limit`` withheld resources that an application of consent must examine."""
    return conn.execute(
        """
        SELECT resource_type, id
        FROM ops.withheld
        WHERE source = ops.current_source() AND due
        ORDER BY resource_type, id
        LIMIT %s
        """,
        [limit],
    ).fetchall()


def mark_due(conn: Connection, keys: Sequence[str] | None) -> None:
    """Mark the withheld resources that the decisions on ``keys`` concern; None: all withheld resources."""
    if keys is None:
        conn.execute("UPDATE ops.withheld SET due = true WHERE source = ops.current_source()")
        return
    conn.execute(
        """
        UPDATE ops.withheld
        SET due = true
        WHERE source = ops.current_source() AND (patients && %(keys)s OR mentions && %(mentions)s)
        """,
        {"keys": list(keys), "mentions": _list_mentions(keys)},
    )
    if deliveries := _list_deliveries(keys):
        conn.execute(
            sql.SQL("""
                UPDATE ops.withheld w
                SET due = true
                WHERE w.source = ops.current_source() AND {delivery} = ANY(%s)
            """).format(delivery=build_delivery_key("w")),
            [deliveries],
        )


def clear_due(conn: Connection, batch: Sequence[ResourceKey]) -> None:
    """Remove the marks of withheld resources."""
    conn.execute(sql.SQL("UPDATE ops.withheld w SET due = false WHERE {}").format(_IN_BATCH), _batch_params(batch))


def resolve_patients(conn: Connection, batch: Sequence[ResourceKey]) -> list[str]:
    """Find the patients that withheld resources name by an identifier.

    Return the ids of the Consents all of whose patients have become known.
    """
    rows = conn.execute(
        sql.SQL("""
            UPDATE ops.withheld w
            SET patients = {patients}
            WHERE {in_batch} AND {has_tokens}
            RETURNING w.resource_type, w.id, {has_tokens}
        """).format(patients=build_resolved_patients("w"), in_batch=_IN_BATCH, has_tokens=build_token_condition("w")),
        _batch_params(batch),
    )
    return [resource_id for name, resource_id, has_tokens in rows if name == "Consent" and not has_tokens]


def resolve_loaded_patients(conn: Connection) -> None:
    """Find the patients that resources in ``fhir.resource`` name by an identifier, after subjects were determined."""
    conn.execute(
        sql.SQL("""
            UPDATE fhir.resource w
            SET patients = {patients}
            WHERE w.source = ops.current_source() AND w.mentions IS NOT NULL AND {has_tokens}
        """).format(patients=build_resolved_patients("w"), has_tokens=build_token_condition("w"))
    )


def update_direct(conn: Connection, consent_gate: ConsentGate, batch: Sequence[ResourceKey]) -> None:
    """Record for withheld resources whether consent itself withholds them."""
    conn.execute(
        sql.SQL("UPDATE ops.withheld w SET direct = {withheld} WHERE {in_batch}").format(
            withheld=build_withheld_condition(consent_gate, "w"), in_batch=_IN_BATCH
        ),
        _batch_params(batch),
    )


def withhold_resources(
    conn: Connection, consent_gate: ConsentGate, *, keys: Sequence[str] | None = None, limit: int | None = None
) -> dict[str, int]:
    """Move loaded resources that are now withheld to ``ops.withheld``, and delete their rows from every view's table.

    Returns the number of moved resources by type, ``limit`` in total at most. With ``keys``, only the resources that
    the decisions on these keys concern are moved.
    """
    affected: sql.Composable = sql.SQL("(cardinality(r.patients) > 0 OR cardinality(r.mentions) > 0)")
    if keys is not None:
        affected = sql.SQL("""
            (
                r.patients[1] = ANY(%(keys)s)
                OR (cardinality(r.patients) > 1 AND r.patients && %(keys)s)
                OR r.mentions && %(mentions)s
            )
        """)
    withheld = build_withheld_condition(consent_gate, "r")
    params = {"keys": list(keys or ()), "mentions": _list_mentions(keys or ()), "limit": limit}
    moved = _move(conn, sql.SQL("{} AND {}").format(affected, withheld), params, direct=True)
    if deliveries := _list_deliveries(keys or ()):
        condition = sql.SQL("{} = ANY(%(deliveries)s) AND {}").format(build_delivery_key("r"), withheld)
        for name, count in _move(conn, condition, {"deliveries": deliveries, "limit": limit}, direct=True).items():
            moved[name] = moved.get(name, 0) + count
    return moved


def withhold_referring(conn: Connection, batch: Sequence[ResourceKey]) -> dict[str, int]:
    """Move the loaded resources that refer to withheld ones to ``ops.withheld``. Returns their number by type."""
    condition = sql.SQL("""
        (
            r.mentions && %(targets)s
            OR r.patients[1] = ANY(%(patients)s)
            OR (cardinality(r.patients) > 1 AND r.patients && %(patients)s)
        )
    """)
    query = sql.SQL("SELECT w.resource_type, w.id, w.mentions FROM ops.withheld w WHERE {}").format(_IN_BATCH)
    patients, targets = list_targets(conn.execute(query, _batch_params(batch)))
    return _move(conn, condition, {"targets": targets, "patients": patients, "limit": None}, direct=False)


def _move(conn: Connection, condition: sql.Composable, params: Mapping[str, object], *, direct: bool) -> dict[str, int]:
    """Move the rows ``r`` of ``fhir.resource`` that meet a condition to ``ops.withheld``, and count them by type."""
    query = sql.SQL("""
        WITH moved AS (
            DELETE FROM fhir.resource
            WHERE (resource_type, id, source) IN (
                SELECT r.resource_type, r.id, r.source
                FROM fhir.resource r
                WHERE r.source = ops.current_source() AND {condition} AND r.resource IS NOT NULL
                LIMIT %(limit)s
            )
            RETURNING *
        ), inserted AS (
            INSERT INTO ops.withheld (
                resource_type, {columns}, replaced_last_updated, run_id, key_id, patients, mentions, direct, resource
            )
            SELECT
                resource_type, {columns}, replaced_last_updated, run_id, key_id, coalesce(patients, '{{}}'), mentions,
                {direct}, resource
            FROM moved
            ON CONFLICT (resource_type, id, source) DO NOTHING
        )
        SELECT resource_type, array_agg(id) FROM moved GROUP BY 1
    """).format(condition=condition, columns=COLUMNS, direct=sql.Literal(direct))
    moved = conn.execute(query, params).fetchall()
    for resource_type, ids in moved:
        delete_view_rows(conn, resource_type, ids)
    return {resource_type: len(ids) for resource_type, ids in moved}


def _list_deliveries(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if key.startswith("@")]


def _list_mentions(keys: Sequence[str]) -> list[str]:
    """Return the values that the column ``mentions`` can have for keys: a token unchanged, an id as ``Patient/id``."""
    return [*keys, *(f"Patient/{key}" for key in keys)]


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


def find_releasable(conn: Session, batch: Sequence[ResourceKey]) -> list[WithheldResource]:
    """Return those of the withheld resources that need not be withheld any more, by type and partition.

    A resource stays withheld as long as consent itself withholds one that it refers to, directly or through other
    withheld resources. Raises EncryptionError if a resource cannot be decrypted.
    """
    query = sql.SQL("""
        WITH RECURSIVE candidate AS MATERIALIZED (
            SELECT w.resource_type, w.id FROM ops.withheld w WHERE {in_batch} AND NOT w.direct
        ), reached (first_type, first_id, resource_type, id) AS (
            SELECT resource_type, id, resource_type, id FROM candidate
            UNION
            SELECT reached.first_type, reached.first_id, target.resource_type, target.id
            FROM reached
            JOIN ops.withheld w
                ON w.source = ops.current_source()
                AND w.resource_type = reached.resource_type
                AND w.id = reached.id
                AND NOT w.direct
            CROSS JOIN LATERAL (
                SELECT t.resource_type, t.id
                FROM unnest(w.mentions || ARRAY(SELECT 'Patient/' || p FROM unnest(w.patients) p)) m
                JOIN ops.withheld t
                    ON t.source = ops.current_source()
                    AND t.resource_type = split_part(m, '/', 1)
                    AND t.id = split_part(m, '/', 2)
                UNION ALL
                SELECT t.resource_type, t.id
                FROM ops.withheld t
                WHERE t.source = ops.current_source()
                    AND t.resource_type = 'Patient'
                    AND t.mentions && ARRAY(SELECT substr(m, 2) FROM unnest(w.mentions) m WHERE starts_with(m, '~'))
            ) target
        )
        SELECT
            w.resource_type, w.partition_key, w.id, coalesce(w.arrived, w.as_of), w.last_updated IS NOT NULL,
            CASE WHEN w.key_id IS NULL THEN w.resource::text ELSE w.resource #>> '{{}}' END,
            w.key_id
        FROM candidate
        JOIN ops.withheld w
            ON w.source = ops.current_source()
            AND w.resource_type = candidate.resource_type
            AND w.id = candidate.id
        WHERE NOT EXISTS (
            SELECT FROM reached
            JOIN ops.withheld target
                ON target.source = ops.current_source()
                AND target.resource_type = reached.resource_type
                AND target.id = reached.id
                AND target.direct
            WHERE (reached.first_type, reached.first_id) = (candidate.resource_type, candidate.id)
        )
        ORDER BY w.resource_type, w.partition_key, w.last_updated IS NOT NULL, w.id
    """).format(in_batch=_IN_BATCH)
    rows = conn.execute(query, _batch_params(batch)).fetchall()
    return [
        WithheldResource(
            resource_type,
            partition_key,
            resource_id,
            arrived,
            dated,
            decrypt_resource(conn, resource_type, resource_id, text, key_id),
        )
        for resource_type, partition_key, resource_id, arrived, dated, text, key_id in rows
    ]


def remove_released(conn: Connection, resource_type: str, ids: Sequence[str]) -> None:
    """Delete loaded resources from ``ops.withheld``. Call it in the transaction of the load.

    Patients who were named by an identifier stay resolved, and resources that refer to the deleted ones are marked.
    """
    conn.execute(
        """
        UPDATE fhir.resource r
        SET patients = w.patients
        FROM ops.withheld w
        WHERE r.source = ops.current_source() AND r.resource_type = %(type)s AND r.id = ANY(%(ids)s)
            AND w.source = r.source AND w.resource_type = %(type)s AND w.id = r.id
            AND r.deleted_at IS NULL AND r.patients <> w.patients
        """,
        {"type": resource_type, "ids": list(ids)},
    )
    removed = conn.execute(
        """
        DELETE FROM ops.withheld
        WHERE source = ops.current_source() AND resource_type = %s AND id = ANY(%s)
        RETURNING id, mentions
        """,
        [resource_type, list(ids)],
    ).fetchall()
    mark_referring(conn, resource_type, removed)


def count_unresolved(conn: Connection, resource_type: str) -> list[tuple[str, int]]:
    """Return the number of withheld resources of a type whose patient is unknown, by the form of the reference to
    it.
    """
    return conn.execute(
        sql.SQL("""
            SELECT CASE WHEN '?' = ANY(w.patients) THEN 'no id' ELSE 'identifier' END, count(*)
            FROM ops.withheld w
            WHERE w.source = ops.current_source() AND w.resource_type = %s AND {is_unresolved}
            GROUP BY 1
            ORDER BY 2 DESC
        """).format(is_unresolved=build_unresolved_condition("w")),
        [resource_type],
    ).fetchall()
