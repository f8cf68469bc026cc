"""A role and a login for each process of a deployment, made at once for the database and for that of Dagster."""

from collections.abc import Mapping

import psycopg

from fhir_assets.errors import ConfigurationError
from fhir_assets.warehouse.postgres.db import role_rights, roles
from fhir_assets.warehouse.postgres.db.connections import Connection, repeat_after_deadlock

LOGINS = {
    role_rights.LOADER: "fhir_assets_loader",
    role_rights.API: "fhir_assets_api",
    role_rights.CONNECTOR: "fhir_assets_connector",
    role_rights.OPERATOR: "fhir_assets_operator",
    role_rights.AUDITOR: "fhir_assets_auditor",
    role_rights.DAGSTER: "fhir_assets_dagster",
}
"""The login of each role that `fhir-assets roles --logins` creates. Readers have logins of their own."""

_PURPOSES = {
    role_rights.READER: "analysts and dashboards",
    role_rights.OPERATOR: "operators on call, metrics",
    role_rights.LOADER: "the code location, runs, workers, the post loader",
    role_rights.API: "the HTTP API",
    role_rights.CONNECTOR: "the connector",
    role_rights.AUDITOR: "auditors",
    role_rights.DAGSTER: "Dagster's own database (DAGSTER_POSTGRES_URL)",
}


def grant_all(conn: Connection, dagster_conn: Connection) -> None:
    """Create all roles, and grant their rights in the database and in Dagster's.

    Raises ConfigurationError if the user may not create roles, or is not the owner of a database.
    """
    if missing := roles.create_missing_roles(conn):
        statements = "; ".join(f"CREATE ROLE {name} NOLOGIN" for name in missing)
        raise ConfigurationError(
            f"the login {conn.info.user} of DB_URL may not create roles: have an administrator run `{statements}`, "
            "then run `fhir-assets roles` again"
        )
    conn.commit()

    def grant() -> None:
        with conn.transaction(), dagster_conn.transaction():
            roles.grant_rights(conn)
            roles.grant_dagster_rights(dagster_conn)

    try:
        repeat_after_deadlock(grant, "the change of rights")
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigurationError(
            f"the login {conn.info.user} of DB_URL is not the owner of all schemas and tables: run `fhir-assets roles` "
            "as their owner"
        ) from None


def ensure_logins(conn: Connection, passwords: Mapping[str, str]) -> None:
    """Create the login of each process; ``passwords`` has those that are set, by login. Raises ConfigurationError."""
    try:
        for role, login in LOGINS.items():
            roles.ensure_login(conn, login, role, passwords.get(login))
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigurationError(
            f"the login {conn.info.user} of DB_URL may not create logins: run `fhir-assets roles --logins` as an "
            "administrator"
        ) from None
    conn.commit()


def describe(conn: Connection) -> list[dict[str, str | None]]:
    """Return each role, what it is for, and its login if it exists."""
    rows = conn.execute("SELECT rolname FROM pg_roles WHERE rolcanlogin AND rolname = ANY(%s)", [[*LOGINS.values()]])
    existing = {name for (name,) in rows}
    return [
        {"role": role, "for": purpose, "login": LOGINS[role] if LOGINS.get(role) in existing else None}
        for role, purpose in _PURPOSES.items()
    ]
