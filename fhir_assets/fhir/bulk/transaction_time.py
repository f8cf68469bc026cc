"""The time up to which an export is complete, after checks of the server's ``transactionTime``.

A later export begins where an earlier one ended. If ``transactionTime`` is ahead of the clock that dates the resources,
the later export begins too late, and no export contains the resources in between.
"""

from datetime import datetime, timedelta

from fhir_assets.errors import NotFhir
from fhir_assets.windows import add_clamped

TOLERANCE = timedelta(minutes=1)
"""How far ``transactionTime`` may be ahead of the server's own clock."""

STALE_AGE = timedelta(days=31)
"""A ``transactionTime`` that is older than this must agree with the resources of the export."""

_DATE_PRECISION = timedelta(seconds=1)
_REMEDY = "nothing of this export is loaded, and nothing is lost. Ask the server's administrator to correct its clock"


def bound_transaction_time(
    claimed: datetime,
    *,
    since: datetime | None,
    requested_at: datetime,
    kick_off_date: datetime | None,
    answer_date: datetime | None,
    now: datetime,
) -> datetime:
    """Return the earliest of ``transactionTime``, the kick-off, and the ``Date`` of the server's answers.

    ``requested_at`` is the time of the kick-off by the local clock; ``now`` is used if ``answer_date`` is None. Raises
    NotFhir if ``claimed`` is more than a minute ahead of the server's clock, or before ``since``.
    """
    clock = answer_date or now
    if claimed - clock > TOLERANCE:
        ahead = _describe(claimed - clock)
        raise NotFhir(
            f"the export's transactionTime {claimed:%Y-%m-%dT%H:%M:%SZ} is {ahead} ahead of the server's clock (is "
            f"it local time written as UTC?): {_REMEDY}, then run again"
        )
    if since is not None and since - claimed > TOLERANCE:
        raise NotFhir(
            f"the export's transactionTime {claimed:%Y-%m-%dT%H:%M:%SZ} is earlier than the requested "
            f"_since {since:%Y-%m-%dT%H:%M:%SZ}: {_REMEDY}, then run again"
        )
    dates = [add_clamped(date, _DATE_PRECISION) for date in (kick_off_date, answer_date) if date is not None]
    return min(claimed, requested_at, *dates)


def check_stale_export(claimed: datetime, requested_at: datetime, newest: datetime | None) -> None:
    """Raise NotFhir if an old ``transactionTime`` contradicts the resources of the export.

    ``newest`` is the greatest ``lastUpdated`` of the export, None if it has no resources: an export that was empty long
    ago does not show that the server is empty now.
    """
    if requested_at - claimed < STALE_AGE:
        return
    if newest is None:
        found = "has no resources"
    elif newest > claimed + timedelta(days=1):
        found = "has resources that were updated later"
    else:
        return
    raise NotFhir(
        f"the export's transactionTime is {claimed:%Y-%m-%d}, {_describe(requested_at - claimed)} before the "
        f"request, and the export {found}: {_REMEDY}, then run again"
    )


def _describe(span: timedelta) -> str:
    if span >= timedelta(days=2):
        return f"{span.days:,} days"
    if span >= timedelta(hours=2):
        return f"{span / timedelta(hours=1):.0f} hours"
    return f"{span / timedelta(minutes=1):.0f} minutes"
