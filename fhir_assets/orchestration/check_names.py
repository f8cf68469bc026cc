"""The names of the checks: those of windows, see ``checks/window.py``, and of whole tables, see ``checks/table.py``."""

RECONCILES = "reconciles"
DEAD_LETTER_RATE = "dead_letter_rate"

FRESH = "fresh"
SCHEMA_MATCHES = "schema_matches"
NO_DUPLICATES = "no_duplicates"
REFERENCES_RESOLVE = "references_resolve"
VOLUME = "volume"
NO_FAILED_PARTITIONS = "no_failed_partitions"
NO_PLAINTEXT_PHI = "no_plaintext_phi"
PATIENTS_KNOWN = "patients_known"

TABLE_CHECKS = frozenset(
    {
        *(FRESH, SCHEMA_MATCHES, NO_DUPLICATES, REFERENCES_RESOLVE, VOLUME),
        *(NO_FAILED_PARTITIONS, NO_PLAINTEXT_PHI, PATIENTS_KNOWN),
    }
)
"""The checks of whole tables. Those of windows are part of the step that materializes their asset."""
