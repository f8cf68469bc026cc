"""All of Dagster: assets, checks, IO managers, jobs, schedules, sensors, resources and the instance."""
