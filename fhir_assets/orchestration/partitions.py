"""The partitions definition of all layers: one partition for each window of ``meta.lastUpdated``, in UTC."""

import dagster as dg

from fhir_assets.windows import WindowScheme

CRON = {"hourly": "0 * * * *", "daily": "0 0 * * *", "monthly": "0 0 1 * *"}
"""The cron schedule whose intervals are the windows of a granularity."""


def build_partitions(scheme: WindowScheme) -> dg.TimeWindowPartitionsDefinition:
    """Return Dagster's partitions for the windows of ``scheme``, including the window that contains the present.

    Partition keys are the keys of the windows.
    """
    return dg.TimeWindowPartitionsDefinition(
        start=scheme.start,
        fmt=scheme.granularity.key_format,
        cron_schedule=CRON[scheme.granularity],
        timezone="UTC",
        end_offset=1,
    )
