"""The order of the versions of a resource, in SQL: which version replaces which.

Every statement that stores, withholds, deletes, counts or compares versions uses these conditions. A version is a row
with the columns

- ``last_updated``: ``meta.lastUpdated``; null if there is none or if it is ignored (``fhir.record.build_record``)
- ``arrived``: the time at which it arrived
- ``as_of``: ``last_updated``, or ``arrived`` if that is null
- ``version_number``: ``meta.versionId`` if it is a number
- ``replaced_last_updated``: of a stored version without ``last_updated``, the newest one that it replaced
"""

from psycopg import sql

_SUPERSEDES = """
    CASE
        WHEN ({new}.last_updated IS NULL) = ({old}.last_updated IS NULL) THEN
            ({new}.as_of, coalesce({new}.version_number, 0)) >= ({old}.as_of, coalesce({old}.version_number, 0))
        WHEN {new}.last_updated IS NULL THEN
            {new}.as_of >= coalesce({old}.arrived, {old}.as_of)
        ELSE
            coalesce({new}.arrived, {new}.as_of) >= {old}.as_of
            AND ({new}.last_updated > {old}.replaced_last_updated) IS NOT FALSE
    END
"""
_SUPERSEDES_STORED = """
    CASE
        WHEN {old}.deleted_at IS NULL THEN {supersedes}
        ELSE
            {new}.as_of > {old}.as_of
            OR {new}.as_of = {old}.as_of AND {new}.version_number > {old}.version_number
    END
"""
_DELETES = """
    {stored}.deleted_at IS NULL
    AND (
        {deletion}.as_of > {stored}.as_of
        OR {deletion}.as_of = {stored}.as_of
            AND coalesce({deletion}.version_number >= {stored}.version_number, true)
    )
"""
_IS_MISSING = """
    CASE
        WHEN {stored}.deleted_at IS NOT NULL OR ({expected}.last_updated IS NULL) = ({stored}.last_updated IS NULL) THEN
            {expected}.as_of > {stored}.as_of
        WHEN {expected}.last_updated IS NULL THEN
            {expected}.as_of > coalesce({stored}.arrived, {stored}.as_of)
        ELSE
            coalesce({expected}.arrived, {expected}.as_of) > {stored}.as_of
            AND ({expected}.last_updated > {stored}.replaced_last_updated) IS NOT FALSE
    END
"""
_IS_NEWER_THAN_FAILED = """
    CASE
        WHEN {failed}.last_updated IS NULL THEN coalesce({stored}.arrived, {stored}.as_of) > {failed}.arrived
        WHEN {stored}.last_updated IS NULL AND {stored}.deleted_at IS NULL THEN
            {stored}.as_of > coalesce({failed}.arrived, {failed}.last_updated)
        ELSE {stored}.as_of > {failed}.last_updated
    END
"""
_REPLACED_LAST_UPDATED = """
    CASE WHEN {new}.last_updated IS NULL THEN coalesce({old}.last_updated, {old}.replaced_last_updated) END
"""


def supersedes(new: str, old: str) -> sql.Composed:
    """Return the condition that the version in the row ``new`` replaces the one in ``old``.

    A version also replaces an equal one.

    - If both have ``last_updated``, or neither has, the one with the greater (``as_of``, ``version_number``) is newer.
    - If only one has ``last_updated``, the one that arrived last is newer. However, if a version was replaced by one
      without ``last_updated`` and is received again, it must not replace that version, and neither must an older one.
      ``replaced_last_updated`` is recorded for this reason.
    """
    return sql.SQL(_SUPERSEDES).format(new=sql.Identifier(new), old=sql.Identifier(old))


def supersedes_stored(new: str, stored: str) -> sql.Composed:
    """Return the condition that a version replaces a row of ``fhir.resource``, which may be a tombstone.

    A version must be newer than a deletion to restore the resource. Without ``last_updated`` it is newer if it arrived
    after the deletion.
    """
    return sql.SQL(_SUPERSEDES_STORED).format(
        new=sql.Identifier(new), old=sql.Identifier(stored), supersedes=supersedes(new, stored)
    )


def deletes(deletion: str, stored: str) -> sql.Composed:
    """Return the condition that a tombstone replaces a row of ``fhir.resource``, also if the times are equal."""
    return sql.SQL(_DELETES).format(deletion=sql.Identifier(deletion), stored=sql.Identifier(stored))


def is_newer_than_stored(expected: str, stored: str) -> sql.Composed:
    """Return the condition that a version is newer than the row of ``fhir.resource`` that should contain it."""
    return sql.SQL(_IS_MISSING).format(expected=sql.Identifier(expected), stored=sql.Identifier(stored))


def is_newer_than_failed(stored: str, failed: str) -> sql.Composed:
    """Return the condition that a row of ``fhir.resource`` is newer than a dead letter whose time is known."""
    return sql.SQL(_IS_NEWER_THAN_FAILED).format(stored=sql.Identifier(stored), failed=sql.Identifier(failed))


def replaced_last_updated(new: str, old: str) -> sql.Composed:
    """Return the value of ``replaced_last_updated`` when the version in ``new`` replaces the one in ``old``."""
    return sql.SQL(_REPLACED_LAST_UPDATED).format(new=sql.Identifier(new), old=sql.Identifier(old))
