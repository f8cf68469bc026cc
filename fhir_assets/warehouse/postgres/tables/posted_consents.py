"""Records Consents before they are loaded, so that they take effect as soon as they are received."""

from collections.abc import Sequence

from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.postgres.db.connections import Session, cipher_of
from fhir_assets.warehouse.postgres.tables.copy_chunks import CopyChunk, PartitionBlock, split_versions
from fhir_assets.warehouse.postgres.tables.load_statements import LoadStatements


def record_posted_consents(conn: Session, blocks: Sequence[PartitionBlock], consent_gate: ConsentGate) -> list[str]:
    """Record Consents in ``ops.consent_records`` as a load does, and return the sorted keys of their patients.

    The policy of ``consent_gate`` must withhold resources. The Consents are not added to the tables.
    """
    cipher = cipher_of(conn)
    statements = LoadStatements("Consent", (), encrypted=cipher.encrypts, consent_gate=consent_gate)
    gate = statements.consent_gate
    mark_patients, copy_consents = statements.record_consents
    params = {"key_id": cipher.key_id}
    keys: set[str] = set()
    with conn.cursor() as cursor:
        cursor.execute(statements.create_stage)
        for chunk in map(CopyChunk, split_versions(blocks)):
            with cursor.copy(statements.copy_to_stage) as copy:
                copy.write(chunk.resource_lines)
            for statement in gate.resolve if gate else ():
                cursor.execute(statement)
            keys.update(key for (key,) in cursor.execute(mark_patients, params).fetchall())
            cursor.execute(copy_consents, params)
            cursor.execute(statements.clear_stage)
    return sorted(keys)
