"""Reads of a patient's resources, each with an audit record, and the reasons why a patient is not in the tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.ops.withheld_conditions import build_withheld_condition
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import StoredResource

__all__ = ["Absence", "explain_absence", "find_patients", "find_withheld", "read_patient", "read_resource"]


def read_patient(
    conn: Session, patient_id: str, *, actor: str, everything: bool = False, request_id: str | None = None
) -> list[StoredResource]:
    """Return the Patient, with ``everything`` all resources of its compartment; an empty list if it is not stored.

    ``actor`` is the name of the user or of the API token. The audit record is committed before the function returns.
    Raises EncryptionError.
    """
    with conn.transaction():
        if everything:
            patient_resources = list(resources.stream_patient(conn, patient_id))
        else:
            patient = resources.read(conn, "Patient", patient_id)
            patient_resources = [patient] if patient else []
        _record_read(conn, "Patient", patient_id, actor, len(patient_resources), request_id)
    conn.commit()
    return patient_resources


def read_resource(
    conn: Session, resource_type: str, resource_id: str, *, actor: str, request_id: str | None = None
) -> StoredResource | None:
    """Return a resource, or None if it is not in the tables, and commit an audit record. See ``read_patient``."""
    with conn.transaction():
        resource = resources.read(conn, resource_type, resource_id)
        _record_read(conn, resource_type, resource_id, actor, 1 if resource else 0, request_id)
    conn.commit()
    return resource


def find_patients(conn: Session, identifier: str) -> Sequence[str]:
    """Return the ids of the patients with an identifier, from the view ``patient_identifier``.

    Encrypted identifiers are searched by their blind index.
    """
    cipher = cipher_of(conn)
    column, value = ("value_index", cipher.index(identifier)) if cipher.encrypts else ("value", identifier)
    query = sql.SQL("""
        SELECT DISTINCT patient_key
        FROM fhir.patient_identifier
        WHERE _source = ops.current_source() AND {column} = %s
        ORDER BY 1
    """)
    try:
        rows = conn.execute(query.format(column=sql.Identifier(column)), [value]).fetchall()
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
        conn.rollback()
        return []
    return [patient_id for (patient_id,) in rows]


def _record_read(
    conn: Session, resource_type: str, resource_id: str, actor: str, count: int, request_id: str | None
) -> None:
    audit_log.record(
        conn,
        AuditRecord(
            "decrypt" if cipher_of(conn).encrypts else "read",
            actor,
            resource_type,
            audit_log.hash_subject(conn, resource_type, resource_id),
            request_id=request_id,
            detail={"found": count},
        ),
    )


@dataclass(frozen=True, slots=True)
class Absence:
    """The reason why a patient is not in the tables. If both fields are False, the patient was never received."""

    withheld: bool = False
    deleted: bool = False


def explain_absence(conn: Connection, patient_id: str) -> Absence:
    """Return the reason why a patient is not in the tables."""
    row = conn.execute(
        """
        SELECT
            EXISTS (
                SELECT FROM ops.withheld
                WHERE source = ops.current_source() AND resource_type = 'Patient' AND id = %(id)s
            ),
            EXISTS (
                SELECT FROM fhir.resource
                WHERE source = ops.current_source()
                    AND resource_type = 'Patient'
                    AND id = %(id)s
                    AND deleted_at IS NOT NULL
            )
        """,
        {"id": patient_id},
    ).fetchone()
    return Absence(*row) if row else Absence()


def find_withheld(conn: Connection, consent_gate: ConsentGate, ids: Sequence[str]) -> frozenset[str]:
    """Return the patients among ``ids`` that consent currently withholds.

    The tables may still contain their resources, until the decision is applied. The identifiers and references of a
    Patient in the tables are taken into account, as in a load.
    """
    if not consent_gate.withholds or not ids:
        return frozenset()
    query = sql.SQL("""
        SELECT p.id
        FROM (
            SELECT
                wanted.id,
                ARRAY[wanted.id] || coalesce(r.patients, '{{}}') AS patients,
                coalesce(r.mentions, '{{}}') AS mentions,
                r.arrived
            FROM unnest(%s::text[]) AS wanted (id)
            LEFT JOIN fhir_partitions.resource_patient r
                ON r.source = ops.current_source() AND r.resource_type = 'Patient' AND r.id = wanted.id
        ) AS p
        WHERE {withheld}
    """).format(withheld=build_withheld_condition(consent_gate, "p"))
    return frozenset(row[0] for row in conn.execute(query, [list(ids)]).fetchall())
