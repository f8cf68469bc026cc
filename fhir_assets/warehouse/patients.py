"""A patient's resources, decrypted for those who hold the keys, with a record in the audit log."""

from collections.abc import Sequence

import psycopg

from fhir_assets.privacy.audit import Deed
from fhir_assets.warehouse import audit_log, resources
from fhir_assets.warehouse.database import Connection, sealing_of
from fhir_assets.warehouse.resources import StoredResource

__all__ = ["find_patients", "read_patient", "read_resource"]


def read_patient(
    conn: Connection, patient_id: str, *, actor: str, everything: bool = False, request_id: str | None = None
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
    conn: Connection, resource_type: str, resource_id: str, *, actor: str, request_id: str | None = None
) -> StoredResource | None:
    """One resource, None if the tables do not have it; on record as ``read_patient``. Commits."""
    with conn.transaction():
        found = resources.read(conn, resource_type, resource_id)
        _record(conn, resource_type, resource_id, actor, 1 if found else 0, request_id)
    conn.commit()
    return found


def find_patients(conn: Connection, identifier: str) -> Sequence[str]:
    """The ids of the patients that bear an identifier (of the view ``patient_identifier``), found by blind index."""
    sealing = sealing_of(conn)
    column, value = ("value_index", sealing.index(identifier)) if sealing.on else ("value", identifier)
    query = "SELECT DISTINCT _resource_key FROM fhir.patient_identifier WHERE {} = %s ORDER BY 1"
    try:
        rows = conn.execute(psycopg.sql.SQL(query).format(psycopg.sql.Identifier(column)), [value]).fetchall()
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
        conn.rollback()
        return []
    return [key for (key,) in rows]


def _record(
    conn: Connection, resource_type: str, resource_id: str, actor: str, found: int, request_id: str | None
) -> None:
    audit_log.record(
        conn,
        Deed(
            "decrypt" if sealing_of(conn).on else "read",
            actor,
            resource_type,
            audit_log.subject(conn, resource_type, resource_id),
            request_id=request_id,
            detail={"found": found},
        ),
    )


def is_withheld(conn: Connection, patient_id: str) -> bool:
    """Whether consent keeps a patient out of the tables."""
    there = conn.execute("SELECT to_regclass('ops.withheld') IS NOT NULL").fetchone()
    if not there or not there[0]:
        return False
    found = conn.execute("SELECT 1 FROM ops.withheld WHERE resource_type = 'Patient' AND id = %s", [patient_id])
    return found.fetchone() is not None
