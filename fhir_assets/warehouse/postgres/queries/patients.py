"""A patient's resources, decrypted for those who hold the keys, with a record in the audit log."""

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from fhir_assets.privacy.audit import AuditRecord
from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import audit_log
from fhir_assets.warehouse.ops.withheld_resources import build_withheld_condition
from fhir_assets.warehouse.postgres import resources
from fhir_assets.warehouse.postgres.db.connections import Connection, Session, cipher_of
from fhir_assets.warehouse.postgres.resources import StoredResource

__all__ = ["Absence", "explain_absence", "find_patients", "find_withheld", "read_patient", "read_resource"]


def read_patient(
    conn: Session, patient_id: str, *, actor: str, everything: bool = False, request_id: str | None = None
) -> list[StoredResource]:
    """The Patient, and with ``everything`` all resources of its compartment; empty if the tables do not have it.

    ``actor`` is who asks. The deed is on record before anything is given; commits. Raises SealingError.
    """
    with conn.transaction():
        if everything:
            found = list(resources.of_patient(conn, patient_id))
        else:
            one = resources.read(conn, "Patient", patient_id)
            found = [one] if one else []
        _record(conn, "Patient", patient_id, actor, len(found), request_id)
    conn.commit()
    return found


def read_resource(
    conn: Session, resource_type: str, resource_id: str, *, actor: str, request_id: str | None = None
) -> StoredResource | None:
    """One resource, None if the tables do not have it; on record as ``read_patient``. Commits."""
    with conn.transaction():
        found = resources.read(conn, resource_type, resource_id)
        _record(conn, resource_type, resource_id, actor, 1 if found else 0, request_id)
    conn.commit()
    return found


def find_patients(conn: Session, identifier: str) -> Sequence[str]:
    """The ids of the patients that bear an identifier (of the view ``patient_identifier``), found by blind index."""
    cipher = cipher_of(conn)
    column, value = ("value_index", cipher.index(identifier)) if cipher.on else ("value", identifier)
    query = "SELECT DISTINCT _resource_key FROM fhir.patient_identifier WHERE {} = %s ORDER BY 1"
    try:
        rows = conn.execute(sql.SQL(query).format(sql.Identifier(column)), [value]).fetchall()
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
        conn.rollback()
        return []
    return [key for (key,) in rows]


def _record(
    conn: Session, resource_type: str, resource_id: str, actor: str, found: int, request_id: str | None
) -> None:
    audit_log.record(
        conn,
        AuditRecord(
            "decrypt" if cipher_of(conn).on else "read",
            actor,
            resource_type,
            audit_log.hash_subject(conn, resource_type, resource_id),
            request_id=request_id,
            detail={"found": found},
        ),
    )


@dataclass(frozen=True, slots=True)
class Absence:
    """Why a patient is not given: ``withheld`` by consent, ``deleted`` at the source, or neither: not known."""

    withheld: bool = False
    deleted: bool = False


def explain_absence(conn: Connection, patient_id: str) -> Absence:
    """What is known of a patient whom the tables do not have."""
    row = conn.execute(
        "SELECT EXISTS (SELECT FROM ops.withheld WHERE resource_type = 'Patient' AND id = %(id)s),"
        " EXISTS (SELECT FROM fhir.resource WHERE resource_type = 'Patient' AND id = %(id)s"
        " AND deleted_at IS NOT NULL)",
        {"id": patient_id},
    ).fetchone()
    return Absence(*row) if row else Absence()


def find_withheld(conn: Connection, gate: ConsentGate, ids: Sequence[str]) -> frozenset[str]:
    """Those whom consent withholds as it stands now, whether or not that is carried out in the tables yet."""
    if not gate.closed or not ids:
        return frozenset()
    query = sql.SQL(
        "SELECT p.id FROM (SELECT id, ARRAY[id] AS patients FROM unnest(%s::text[]) AS id) AS p WHERE {}"
    ).format(build_withheld_condition(gate, "p"))
    return frozenset(row[0] for row in conn.execute(query, [list(ids)]).fetchall())
