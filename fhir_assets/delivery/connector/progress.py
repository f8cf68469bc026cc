"""The progress of the connector since a given time, and whether it keeps up with the changes."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from fhir_assets.delivery.connector import outbox
from fhir_assets.warehouse.postgres.db.connections import Connection

_SETTLED = timedelta(seconds=2)
"""The maximum time between the evaluation of ``clock_timestamp()`` in a transaction and its commit."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The numbers of changes acknowledged in a half-open period that ends at ``until``, by outcome."""

    until: datetime
    by_outcome: dict[str, int]

    @property
    def changes(self) -> int:
        """The number of all changes."""
        return sum(self.by_outcome.values())


def count_since(conn: Connection, source: str, moment: datetime | None) -> Progress:
    """Count the changes acknowledged from ``moment`` on. With None, count no change and return only ``until``."""
    row = conn.execute("SELECT clock_timestamp() - %s", [_SETTLED]).fetchone()
    assert row is not None
    until: datetime = row[0]
    rows = conn.execute(
        """
        SELECT outcome, count(*)
        FROM health.fhir_processed_event
        WHERE source = %s AND processed_at >= %s AND processed_at < %s
        GROUP BY outcome
        ORDER BY outcome
        """,
        [source, moment or until, until],
    )
    return Progress(until, dict(rows.fetchall()))


@dataclass(frozen=True, slots=True)
class Health:
    """Whether deliveries keep up with the changes. ``summary`` states the reason and the remedy."""

    passed: bool
    summary: str
    status: outbox.Status


def check_health(conn: Connection, *, max_lag_seconds: float) -> Health:
    """Return the health of the deliveries: bad if the oldest change waits too long or dead letters are open."""
    status = outbox.read_status(conn)
    problems = []
    if status.lag_seconds > max_lag_seconds:
        remedy = "is the FHIR server up?" if status.connectors else "start `fhir-assets connector run`"
        problems.append(
            f"{status.unprocessed} changes wait, the oldest for {status.lag_seconds:.0f} s "
            f"(CONNECTOR_MAX_LAG_SECONDS is {max_lag_seconds:.0f}): {remedy}"
        )
    if status.dead:
        problems.append(f"{status.dead} changes were refused: `fhir-assets connector dlq list` shows the reasons")
    return Health(not problems, "; ".join(problems) or "no change is overdue", status)
