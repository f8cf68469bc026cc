"""What the connector has done since some moment, and whether it keeps up."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from fhir_assets.delivery.connector import outbox
from fhir_assets.warehouse.postgres.db.connections import Connection

_SETTLED = timedelta(seconds=2)
"""How long a transaction may take to commit after its time was taken."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Changes acknowledged in the half-open time from the one asked for to ``until``, by outcome."""

    until: datetime
    by_outcome: dict[str, int]

    @property
    def changes(self) -> int:
        """How many there are."""
        return sum(self.by_outcome.values())


def since(conn: Connection, source: str, moment: datetime | None) -> Progress:
    """What was acknowledged from ``moment`` on; None: nothing yet, only the time to ask from next."""
    row = conn.execute("SELECT clock_timestamp() - %s", [_SETTLED]).fetchone()
    assert row is not None
    until: datetime = row[0]
    rows = conn.execute(
        "SELECT outcome, count(*) FROM health.fhir_processed_event"
        " WHERE source = %s AND processed_at >= %s AND processed_at < %s GROUP BY 1 ORDER BY 1",
        [source, moment or until, until],
    )
    return Progress(until, dict(rows.fetchall()))


@dataclass(frozen=True, slots=True)
class Health:
    """Whether deliveries keep up. ``said`` says it in a sentence, with what to do if they do not."""

    passed: bool
    said: str
    status: outbox.Status


def health(conn: Connection, *, max_lag_seconds: float) -> Health:
    """Red if the oldest change waits too long, or if there are open dead letters."""
    status = outbox.status(conn)
    faults = []
    if status.lag_seconds > max_lag_seconds:
        remedy = "is the FHIR server up?" if status.connectors else "start `fhir-assets connector run`"
        faults.append(
            f"{status.unprocessed} changes wait, the oldest for {status.lag_seconds:.0f} s "
            f"(CONNECTOR_MAX_LAG_SECONDS is {max_lag_seconds:.0f}): {remedy}"
        )
    if status.dead:
        faults.append(f"{status.dead} changes were refused: `fhir-assets connector dlq list` says why")
    return Health(not faults, "; ".join(faults) or "every change is delivered, or about to be", status)
