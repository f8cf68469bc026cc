"""Run tags and pools: the names that the project's runs, schedules, sensors and steps share.

No logic belongs here. Job names are in ``jobs.py``.
"""

REFRESH_TAG = "fhir_assets/refresh"
"""How much a run loads: ``missing``, ``window`` (the default) or ``full``. See ``pipeline.refresh.Refresh``."""

TRIGGER_TAG = "fhir_assets/triggered_by"
"""The user for whom ``fhir-assets`` executes a run in its own process.

That process takes the advisory lock of the run before it creates the run. A run that Dagster launches to execute such a
run again has the tag too: see ``command_runs.is_command_run``.
"""

USER_TAG = "user"
"""The user who requested a run from Dagster. The run holds no advisory lock until a worker starts it."""

REPLAY_TAG = "fhir_assets/replay"
"""The dead letters that a run replays: ``marked`` (those marked for a replay) or ``open`` (all open dead letters of the
run's windows). A run without the tag replays no dead letters.
"""

PRIORITY_TAG = "dagster/priority"
"""Dagster's own tag of a step: steps with a higher number start first."""

RETRY_TAG = "dagster/retry_on_asset_or_op_failure"
"""Dagster's own tag of a run: ``true`` if the daemon retries the run after a failed step."""

MAX_RETRIES_TAG = "dagster/max_retries"
"""Dagster's own tag of a run: how often the daemon retries the run."""

PARTITION_TAG = "dagster/partition"
"""Dagster's own tag of a run of one partition."""

RANGE_START = "dagster/asset_partition_range_start"
"""Dagster's own tag of a run of several partitions: the key of the first."""

RANGE_END = "dagster/asset_partition_range_end"
"""Dagster's own tag of a run of several partitions: the key of the last."""

FHIR_SERVER_POOL = "fhir_server"
"""The pool of all steps that call the FHIR server. It has no limit unless an operator sets one in the UI.
FHIR_MAX_CONNECTIONS limits the connections in any case.
"""

UNPARTITIONED = ""
"""The partition of a run or check without partitions in ``ops.incidents``."""
