"""Uploads NDJSON resources to a FHIR server, in batches and in referential order. Uses neither Dagster nor Postgres."""
