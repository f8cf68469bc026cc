"""The Dagster instance: its configuration, and the classes that ``dagster.yaml`` names."""
