"""The keys of every advisory lock of Postgres that the project takes, so that no two locks share a key by accident.

A value spells four ASCII characters, which are visible in ``pg_locks.classid`` and ``objid``. Values never change:
processes of the old and the new version share a database during an upgrade. A lock with two keys has one of these
constants as first key and a number as second: a counter, or ``hashtext`` of a name. ``warehouse/lake`` locks a view by
the 64-bit hash of its name, which is a separate key space.
"""

from typing import Final

SCHEMA: Final = 0x66686972
"""Changes of the schema: migrations, and new or wider tables of views. "fhir"."""

SOURCE_CALLS: Final = 0x66686331
"""First key of a slot of FHIR_MAX_CONNECTIONS: one call of the FHIR server. "fhc1"."""

TABLE_LOADS: Final = 0x66686C31
"""First key of a slot of FHIR_MAX_LOADERS: one load into the tables. "fhl1"."""

LIVE_RUN: Final = 0x6668726E
"""First key of a run that is alive; the second key is the hash of its id. "fhrn"."""

EXECUTED_RUN: Final = 0x66686578
"""First key of a run that a Celery worker executes; the second key is the hash of its id. "fhex"."""

PARTITION_COMMIT: Final = 0x66686D66
"""First key of a partition whose manifest is being replaced; the second key is the hash of its folder. "fhmf"."""

BULK_EXPORT: Final = 0x66686265
"""First key of a server whose bulk export is in progress; the second key is the hash of its URL. "fhbe"."""

CONSENT_DECISIONS: Final = 0x66686370
"""The consent decisions: loads hold the lock shared, a change of decisions holds it exclusively. "fhcp"."""

IDENTIFIER_TYPE: Final = 0x66686974
"""First key of a type whose resources are found by identifier; the second key is the hash of the type. "fhit".

Loads of the type hold the lock shared, the first conditional reference to the type takes it exclusively.
"""

CONSENT_POSTS: Final = 0x66686371
"""The decisions of posted Consents: requests and changes of decisions hold the lock exclusively. "fhcq"."""

IDEMPOTENT_REQUEST: Final = 0x66686964
"""First key of an API request in progress; the second key is the hash of its idempotency key. "fhid"."""

KEY_ROTATION: Final = 0x66686B72
"""The rotation of encryption keys. "fhkr"."""

RECEIVED_ORIGIN: Final = 0x66687263
"""First key of a file or request that is being received; the second key is the hash of its origin. "fhrc"."""

POST_LOADER: Final = 0x6668706C
"""First key of the running post loader of a source; the second key is the hash of the source. "fhpl"."""

VISIT_LEDGER: Final = 0x66687669
"""Writes to the ledger of persons and visits. "fhvi"."""

CONNECTOR: Final = 0x66686378
"""First key of a running connector; the second key is the connector's number, 0 while numbers are given. "fhcx"."""

CONNECTOR_IDENTIFIER: Final = 0x66686379
"""First key of a business identifier that a connector delivers; the second key is its hash. "fhcy"."""

AUDIT_MARK: Final = 0x6668616D
"""The mark of the audit log in the store while it is written. "fham"."""
