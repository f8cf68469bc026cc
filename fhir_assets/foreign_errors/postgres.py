"""Errors of Postgres, by their SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html)."""

from fhir_assets.errors import ConfigurationError, DatabaseUnavailable, FhirAssetsError, OutOfResources, PermanentError

_DRIVERS = {"psycopg", "psycopg_pool", "psycopg2", "dagster_postgres"}

_LOST_CONNECTIONS = {"OperationalError", "InterfaceError", "PoolTimeout", "PoolClosed", "DagsterPostgresException"}
LOST = "Postgres cannot be reached: start it, or correct DB_URL, then try again"

_ERRORS: dict[str, tuple[type[FhirAssetsError], str]] = {
    "08": (DatabaseUnavailable, "the connection to Postgres broke: check that it runs, then try again"),
    "25006": (
        ConfigurationError,
        "Postgres is read-only: it is a standby, or default_transaction_read_only is set for the database or the user. "
        "Let DB_URL name the primary, or have the setting reset",
    ),
    "57014": (
        DatabaseUnavailable,
        "Postgres cancelled a statement, because of statement_timeout or an administrator: try again, or raise the "
        "timeout for the user of DB_URL",
    ),
    "57P01": (DatabaseUnavailable, "Postgres was shut down or restarted: try again when it runs"),
    "57P02": (DatabaseUnavailable, "Postgres crashed and restarts: try again when it runs, and see its log"),
    "57P03": (DatabaseUnavailable, "Postgres starts, stops or recovers: try again when it accepts connections"),
    "57P04": (ConfigurationError, "the database was dropped: create it, or correct DB_URL"),
    "57P05": (DatabaseUnavailable, "Postgres ended an idle connection (idle_session_timeout): try again"),
    "25P03": (
        DatabaseUnavailable,
        "Postgres ended an open transaction (idle_in_transaction_session_timeout): try again",
    ),
    "25P04": (DatabaseUnavailable, "Postgres ended a long transaction (transaction_timeout): try again, or raise it"),
    "53100": (OutOfResources, "the disk of Postgres is full: free space there, then try again"),
    "53200": (OutOfResources, "Postgres has not enough memory (or max_locks_per_transaction): give it more, try again"),
    "53300": (
        DatabaseUnavailable,
        "Postgres has no connection left: end others, or raise max_connections, then try again",
    ),
    "53400": (ConfigurationError, "a limit in the configuration of Postgres is too low (temp_file_limit): raise it"),
    "40001": (DatabaseUnavailable, "Postgres cancelled a transaction because of another one: try again"),
    "40003": (DatabaseUnavailable, "the connection to Postgres broke during a commit: try again"),
    "40P01": (DatabaseUnavailable, "Postgres cancelled a transaction because of a deadlock: try again"),
    "55P03": (
        DatabaseUnavailable,
        "another session of Postgres holds a lock (pg_stat_activity lists the sessions): end it, or try again later",
    ),
    "55006": (DatabaseUnavailable, "another session uses an object of Postgres: end it, or try again later"),
    "28": (ConfigurationError, "Postgres refuses the user or the password of DB_URL: correct them"),
    "3D000": (ConfigurationError, "the database of DB_URL does not exist: create it, or correct DB_URL"),
    "42P01": (ConfigurationError, "a table is missing in Postgres: run `fhir-assets migrate`, or restore the table"),
    "42703": (ConfigurationError, "a column is missing in Postgres: run `fhir-assets migrate`, or restore the column"),
    "42883": (ConfigurationError, "a function is missing in Postgres: run `fhir-assets migrate`, or restore it"),
    "3F000": (ConfigurationError, "a schema is missing in Postgres: run `fhir-assets migrate`"),
    "42809": (
        ConfigurationError,
        "a relation of schema fhir or ops is of another kind than this version creates, such as a foreign table or a "
        "view in place of a table: drop or rename it, then run `fhir-assets migrate`",
    ),
    "55000": (
        ConfigurationError,
        "an object of Postgres is not in the state that is needed, such as a foreign table without its server: restore "
        "or drop it, then run `fhir-assets migrate`",
    ),
    "0A000": (
        ConfigurationError,
        "Postgres does not support an operation on a relation, because it is a foreign table, a view or unlogged: drop "
        "or rename it, then run `fhir-assets migrate`",
    ),
    "HV": (ConfigurationError, "a foreign table of Postgres cannot be used: correct its server, or drop the table"),
    "22021": (ConfigurationError, "the database does not have the encoding UTF8: create one with ENCODING 'UTF8'"),
    "22P05": (ConfigurationError, "the database does not have the encoding UTF8: create one with ENCODING 'UTF8'"),
    "26000": (
        ConfigurationError,
        "a prepared statement is gone: DB_URL names a pooler in transaction mode, such as PgBouncer. Let it name "
        "Postgres itself",
    ),
    "58": (DatabaseUnavailable, "Postgres cannot read or write its files: see its log and the disk, then try again"),
    "XX001": (PermanentError, "a file of Postgres is damaged: see its log, and restore a backup"),
    "XX002": (PermanentError, "an index of Postgres is damaged: run REINDEX DATABASE, see the log of Postgres"),
}
"""The error and its sentence by SQLSTATE, or by the class of SQLSTATEs: its first two characters."""


_MISSING_RIGHT = "42501"
_REFUSALS = ("permission denied", "must be ", "only ")
"""How the sentences of Postgres about a missing right begin. They name an object and no value; others may quote one."""

_LOGIN = "The login of the session is "


def note_login(error: BaseException, login: str) -> None:
    """Keep with an error of Postgres about a missing right which login lacks it, which Postgres does not say."""
    if getattr(error, "sqlstate", None) == _MISSING_RIGHT and not _find_login(error):
        error.add_note(f"{_LOGIN}{login}")


def _find_login(error: BaseException) -> str | None:
    """Return the login that lacks a right, if ``note_login`` or psycopg2 kept it."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith(_LOGIN):
            return str(note.removeprefix(_LOGIN))
    connection = getattr(getattr(error, "cursor", None), "connection", None)
    return getattr(getattr(connection, "info", None), "user", None)


def _describe_missing_right(error: BaseException) -> ConfigurationError:
    login = _find_login(error)
    refusal = str(getattr(getattr(error, "diag", None), "message_primary", None) or "")
    right = f": {refusal}" if refusal.startswith(_REFUSALS) else ""
    return ConfigurationError(
        f"{f'the login {login}' if login else 'the user of DB_URL'} lacks a right in Postgres{right}. Run this process "
        "with the login that is made for it, grant its login the role of the process (`fhir-assets roles` lists them: "
        "fhir_loader, fhir_operator, …), or run the command as the owner of the database "
        f"(SQLSTATE {_MISSING_RIGHT})"
    )


def translate_postgres_error(error: BaseException) -> FhirAssetsError | None:
    """Return the error of the project for an error of psycopg, psycopg2 or a pool of connections; None for others."""
    if type(error).__module__.partition(".")[0] not in _DRIVERS and not hasattr(error, "sqlstate"):
        return None
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state is None:
        names = {base.__name__ for base in type(error).__mro__}
        return DatabaseUnavailable(LOST) if names & _LOST_CONNECTIONS else None
    if state == _MISSING_RIGHT:
        return _describe_missing_right(error)
    kind, sentence = _ERRORS.get(state) or _ERRORS.get(state[:2]) or (None, "")
    return kind(f"{sentence} (SQLSTATE {state})") if kind else None
