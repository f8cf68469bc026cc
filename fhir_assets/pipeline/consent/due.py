"""Whether consent has to be applied again, because the tables no longer match the consents."""

from datetime import datetime

from fhir_assets.privacy.consent import ConsentGate
from fhir_assets.warehouse.ops import consents, dead_consents, withheld_changes
from fhir_assets.warehouse.postgres.db.connections import Connection


def has_due_decisions(conn: Connection, consent_gate: ConsentGate, now: datetime) -> bool:
    """Return whether decisions are due at ``now``, or the tables were made with another policy than ``consent_gate``.

    A decision is due when the period of a consent begins or ends, or when the policy changes.
    """
    applied = consents.get_applied_policy(conn).consent_gate
    if applied != consent_gate:
        return True
    return applied.withholds and bool(
        consents.find_due_patients(conn, now, 1) or withheld_changes.find_due(conn, 1) or dead_consents.is_changed(conn)
    )
