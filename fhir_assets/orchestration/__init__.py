"""Dagster definitions: assets, checks, IO managers, jobs, schedules, sensors and resources; and the instance."""
