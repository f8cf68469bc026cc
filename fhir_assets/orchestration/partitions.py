"""The one partition scheme: windows of ``meta.lastUpdated``, UTC, the open window included."""

import dagster as dg

from fhir_assets.windows import WindowScheme

CRON = {"hourly": "0 * * * *", "daily": "0 0 * * *", "monthly": "0 0 1 * *"}


def partitions_definition(scheme: WindowScheme) -> dg.TimeWindowPartitionsDefinition:
    """Dagster's partitions for the windows of ``scheme``; keys are the windows' keys."""
    return dg.TimeWindowPartitionsDefinition(
        start=scheme.start,
        fmt=scheme.granularity.key_format,
        cron_schedule=CRON[scheme.granularity],
        timezone="UTC",
        end_offset=1,
    )
