"""Classes that ``dagster.yaml`` names for Dagster's instance, and the configuration of the instance."""
