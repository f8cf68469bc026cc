"""Repairs of schemas that an earlier text of a migration made, which later migrations cannot upgrade.

0001 and 0004 were changed after databases had been made with them. A repair runs before the upgrade of a database whose
revision is in its range, and changes nothing in a database of the newer text.
"""

from dataclasses import dataclass
from typing import LiteralString


@dataclass(frozen=True, slots=True)
class SchemaRepair:
    """A statement for databases of the revisions from ``first`` to ``last``, before they are upgraded."""

    first: str
    last: str
    statement: LiteralString


REPAIRS = (
    SchemaRepair(
        "0001",
        "0003",
        """
        CREATE INDEX IF NOT EXISTS dead_letters_resource_type_status_rule_id_idx
        ON ops.dead_letters (resource_type, status, rule, id)
        """,
    ),
    SchemaRepair("0004", "0019", "ALTER TABLE ops.corrections ADD COLUMN IF NOT EXISTS sealed_by text"),
    SchemaRepair(
        "0004", "0019", "DROP INDEX IF EXISTS ops.dead_letters_marked_at_idx, ops.dead_letters_claimed_by_idx"
    ),
)


def find_repairs(revision: str) -> list[LiteralString]:
    """Return the statements for a database of a revision."""
    return [repair.statement for repair in REPAIRS if repair.first <= revision <= repair.last]
