"""What the project plugs into Dagster's instance: its storage, its queue of runs, its launcher for Celery."""
