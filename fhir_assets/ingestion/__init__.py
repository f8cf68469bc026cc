"""Loads that the command line executes in its own process, without Dagster's daemon and webserver.

``due_loads`` finds what to load and ``unreconciled`` what does not add up, both without Dagster, because an import of
Dagster takes longer than they do. ``runs`` executes Dagster's jobs.
"""
