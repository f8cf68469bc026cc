"""The tables of schema ``ops`` with encrypted columns, which a key rotation encrypts again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg import sql

from fhir_assets.privacy.places import (
    Place,
    answer_place,
    correction_place,
    dead_letter_place,
    landing_name_place,
    resource_place,
)

OUTDATED = "(key_id IS NULL OR key_id = ANY(%(older)s))"
KEY_ID_OF_ORIGINAL = """
    CASE substring(original FOR 3)
        WHEN 'FS1' THEN encode(substring(original FROM 4 FOR 4), 'hex')
        WHEN 'FS2' THEN encode(substring(original FROM 4 FOR 4), 'hex') || ':bound'
    END
"""
"""The key id of an original, as ``privacy.encryption.key_id_of`` returns it."""


@dataclass(frozen=True, slots=True)
class EncryptedTable:
    """A table of schema ``ops`` with encrypted columns (``contents``, all jsonb or all bytea) and a column ``key_id``.

    ``places`` returns the place of each column in ``contents``; its arguments are the columns ``named_by`` of the row.
    ``outdated`` is the condition for rows that are not encrypted with the newest key or not bound to their place; its
    parameter ``older`` is ``Cipher.outdated_key_ids``.
    """

    name: str
    table: str
    key: tuple[str, ...]
    contents: tuple[str, ...]
    named_by: tuple[str, ...]
    places: Callable[..., Sequence[Place]]
    json: bool = False
    outdated: LiteralString = OUTDATED

    @property
    def identifier(self) -> sql.Identifier:
        """The qualified name of the table."""
        return sql.Identifier("ops", self.table)

    @property
    def key_columns(self) -> sql.Composed:
        """The key columns, separated by commas."""
        return sql.SQL(", ").join(map(sql.Identifier, self.key))


ENCRYPTED_TABLES = (
    EncryptedTable(
        "withheld",
        "withheld",
        ("resource_type", "id", "source"),
        ("resource",),
        ("source", "resource_type", "id"),
        lambda source, resource_type, resource_id: [resource_place(source, resource_type, resource_id)],
        json=True,
    ),
    EncryptedTable(
        "consents",
        "consent_records",
        ("consent_id", "source"),
        ("resource",),
        ("source", "consent_id"),
        lambda source, consent_id: [resource_place(source, "Consent", consent_id)],
        json=True,
    ),
    EncryptedTable(
        "dead_letters",
        "dead_letters",
        ("id",),
        ("resource",),
        ("source", "fingerprint"),
        lambda source, fingerprint: [dead_letter_place(source, fingerprint)],
    ),
    EncryptedTable(
        "corrections",
        "corrections",
        ("fingerprint", "source"),
        ("resource", "original"),
        ("source", "fingerprint"),
        lambda source, fingerprint: [correction_place(source, fingerprint), dead_letter_place(source, fingerprint)],
        # The original is a copy of the dead letter's bytes and may be encrypted with another key than the correction.
        outdated=f"({OUTDATED} OR original IS NOT NULL AND coalesce({KEY_ID_OF_ORIGINAL} = ANY(%(older)s), true))",
    ),
    EncryptedTable(
        "landing_files",
        "landing_files",
        ("source", "zone", "name"),
        ("encrypted_name",),
        ("source", "zone", "name"),
        lambda source, zone, label: [landing_name_place(source, zone, label)],
        # Names in the clear are replaced by labels: see clear_landing_names.
        outdated="key_id = ANY(%(older)s)",
    ),
    EncryptedTable("answers", "idempotency", ("key",), ("answer",), ("key",), lambda key: [answer_place(key)]),
)
