"""The group roles, one for each kind of process or person, and the rights of each on the tables of schema ``ops``.

Operators, auditors, the API and the connector have the rights that are listed here, and none on a table that is new.
"""

READER, OPERATOR, LOADER = "fhir_reader", "fhir_operator", "fhir_loader"
API, CONNECTOR, AUDITOR, DAGSTER = "fhir_api", "fhir_connector", "fhir_auditor", "fhir_dagster"
ROLES = (READER, OPERATOR, LOADER, API, CONNECTOR, AUDITOR, DAGSTER)

LOAD_RIGHTS = "SELECT, INSERT, UPDATE, DELETE"

_SESSION = {"alembic_version": "SELECT", "encryption": "SELECT"}
"""What every process reads when it opens the database with keys."""

_RUNS = dict.fromkeys(
    (
        "bulk_exports",
        "bulk_parts",
        "checkpoints",
        "deletion_checkpoints",
        "deletion_parts",
        "deployment",
        "held_windows",
        "ingestion_runs",
        "landing_files",
        "loaded_parts",
        "marts",
        "partition_rows",
        "run_summary",
        "run_types",
        "sources",
        "view_tables",
        "visit_files",
        "window_verdicts",
    ),
    "SELECT",
)
"""Tables about runs, windows, files and settings. None names a patient."""

_AUDIT = {"audit_log": "SELECT", "audit_head": "SELECT"}

_LOADER_EXCEPTIONS = {
    "alembic_version": "SELECT",
    "migration_checksums": "SELECT",
    **_AUDIT,
    "encryption": "SELECT, INSERT",
    "key_rotations": "SELECT",
}
"""The loader's rights where it has fewer than ``LOAD_RIGHTS``."""

_RIGHTS: dict[str, dict[str, str]] = {
    OPERATOR: {
        **_SESSION,
        **_RUNS,
        **_AUDIT,
        "migration_checksums": "SELECT",
        "alert_cursor": "SELECT",
        "consent_policy": "SELECT",
        "key_rotations": "SELECT",
        "missing_references": "SELECT",
        "dead_letters": "SELECT, INSERT, UPDATE",
        "corrections": "SELECT, INSERT, UPDATE",
        "received": "SELECT, INSERT, UPDATE",
        "incidents": "SELECT, UPDATE",
        "window_verdicts": "SELECT, INSERT, UPDATE",
    },
    API: {
        **_RUNS,
        **_AUDIT,
        "alembic_version": "SELECT",
        "migration_checksums": "SELECT",
        "encryption": "SELECT, INSERT",
        "alert_cursor": "SELECT",
        "consent_policy": "SELECT, INSERT, UPDATE",
        "key_rotations": "SELECT",
        "missing_references": "SELECT",
        "incidents": "SELECT",
        "deployment": "SELECT, INSERT, UPDATE",
        "sources": "SELECT, INSERT, UPDATE",
        "window_verdicts": "SELECT, INSERT, UPDATE",
        **dict.fromkeys(
            (
                "consent_changes",
                "consent_records",
                "consents",
                "corrections",
                "dead_letters",
                "idempotency",
                "identifier_types",
                "landing_files",
                "numbers",
                "partition_rows",
                "posted_resources",
                "received",
                "record_posts",
                "visit_files",
                "visit_persons",
                "visit_persons_elsewhere",
                "visit_posts",
                "visits",
                "withheld",
            ),
            LOAD_RIGHTS,
        ),
    },
    CONNECTOR: _SESSION,
    AUDITOR: {**_SESSION, **_AUDIT, "deployment": "SELECT", "ingestion_runs": "SELECT"},
}

APPENDS_TO_AUDIT_LOG = (LOADER, OPERATOR, API, AUDITOR)
"""The roles that may call the functions of migration 0044, the only way to append to the audit log."""

AUDIT_FUNCTIONS = ("lock_audit_head()", "append_audit(timestamptz, jsonb)", "confirm_audit_mark()")


def find_ops_rights(role: str, table: str) -> str:
    """Return the rights of a role on a table or view of schema ``ops``; empty if it has none."""
    if role == LOADER:
        return _LOADER_EXCEPTIONS.get(table, LOAD_RIGHTS)
    return _RIGHTS.get(role, {}).get(table, "")


def uses_ops(role: str) -> bool:
    """Return whether a role has any right in schema ``ops``."""
    return role == LOADER or role in _RIGHTS
