"""Resources to a FHIR server, in batches. Knows neither Dagster nor Postgres."""
